"""Objectives against Hugging Face's own losses, and documents kept apart in every causal and masked class we serve."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM
from seqwarm.core.corpus import Packed
from seqwarm.core.errors import Refusal
from seqwarm.core.objectives import Draws, causal, mlm, objective

V, S = 60, 24
SMALL = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=1)
MODELS = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=S, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)),
          "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=S)),
          "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=S)),
          "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=S + 2))}

class Tok:
    mask_token_id, all_special_ids = 4, [0, 1, 2, 3, 4]
    def __len__(self): return V

def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    docs = [np.r_[0, rng.integers(5, V, n - 2), 2] for n in lengths]
    segments = np.concatenate([np.full(len(d), i) for i, d in enumerate(docs)])
    packed = Packed(np.concatenate(docs)[None], segments[None], np.concatenate([np.arange(len(d)) for d in docs])[None], np.array([0]))
    return docs, packed

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_read_as_if_alone(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]().eval(); model.set_attn_implementation(attention)
    ask = causal if name in ("gpt2", "llama") else mlm
    docs, packed = documents(5, 12, 7)
    with torch.no_grad():
        batch = ask(packed, Draws(0, 0, packed.samples), model.config, Tok()); ids = batch["input_ids"]; batch.pop("labels")
        together, begin = model(**batch).logits[0], 0
        for d in docs:  # plain calls, with the model's own masks and positions
            alone = model(input_ids=ids[:, begin:begin + len(d)]).logits[0]
            assert torch.allclose(together[begin:begin + len(d)], alone, atol=2e-5)
            begin += len(d)

def test_causal_loss_is_hugging_face_s():
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval(); docs, packed = documents(9)
    batch = causal(packed, None, model.config, None); labels = batch.pop("labels")
    with torch.no_grad():
        ours = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
        assert torch.allclose(ours, model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, atol=1e-6)

def test_mlm_depends_on_seed_step_and_sample_alone():
    ids = np.random.default_rng(0).integers(5, V, (6, S)); zeros = np.zeros_like(ids)
    batch = lambda rows, seed=0, step=0: mlm(Packed(ids[rows], zeros[rows], zeros[rows], np.array(rows)), Draws(seed, step, np.array(rows)), MODELS["bert"]().config, Tok())["input_ids"]
    whole = batch([0, 1, 2, 3, 4, 5])
    assert torch.equal(whole[[4, 1]], batch([4, 1]))
    assert not torch.equal(whole, batch([0, 1, 2, 3, 4, 5], step=1)) and not torch.equal(whole, batch([0, 1, 2, 3, 4, 5], seed=1))

def test_uniform_numbers_are_uniform():
    u = np.concatenate([Draws(s, t, np.arange(50)).uniform(40).ravel() for s in range(5) for t in range(5)])
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - len(u) / 20)**2 / (len(u) / 20)).sum() < 43.8  # chi square, 19 degrees of freedom, one in a thousand

def test_refusals():
    with pytest.raises(Refusal, match="did you mean 'causal'"): objective("casual")
    class NoMask(Tok): mask_token_id = None
    _, packed = documents(5)
    with pytest.raises(Refusal, match="mask token"): mlm(packed, Draws(0, 0, packed.samples), None, NoMask())
