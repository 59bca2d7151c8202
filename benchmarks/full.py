"""On paper: what each recipe takes at scale `full`, one seed, and whether one GPU does it in ten minutes.

    python benchmarks/full.py [--peak 990] [--share 0.4] [--out results/full.csv]

FLOPs are the ledger's, of all trainings that the recipe names (probes, measurements and growing itself are not in it). `peak` is what the
data sheet of an H200 says of dense bfloat16, in TFLOP/s; `share` is assumed, not measured. `step_ms` is a step of the large model at that
share: a loop of single kernels has about 250 of them a layer and step, 5 microseconds each at least (both guesses), and where `launch_ms`
is more than `step_ms` the share will not be reached without `compile` or a larger batch; `minutes` takes the larger of both for every step,
and `reference_minutes` are those of one training of the reference alone.
Memory is 16 bytes a parameter, 34 N D bytes a layer and stack (Korthikanti et al., 2022, arXiv:2205.05198, without attention's weights) and
14 N V of logits, for N tokens a step.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
from transformers import BertConfig, GPT2Config, MBartConfig, MPNetConfig
from seqwarm.core.joint import joint
from seqwarm.core.layout import Layout, layout
from seqwarm.core.stages import Stage
from seqwarm.core.train import costs
from seqwarm.recipes import clp, growth, metro, sequential, together

def gpt2(p: SimpleNamespace, width: int, layers: int) -> Layout:
    return layout(GPT2Config(vocab_size=p.vocab, n_positions=p.length, n_embd=width, n_layer=layers, n_head=4), "GPT2LMHeadModel")

def masked(p: SimpleNamespace, config) -> Layout:
    "A masked LM whose head works where it is asked."
    own = config(vocab_size=p.vocab, hidden_size=p.width, num_hidden_layers=p.layers, num_attention_heads=4, intermediate_size=4*p.width)
    name = dict(BertConfig="BertForMaskedLM", MPNetConfig="MPNetForMaskedLM")[config.__name__]
    return joint("Masked", dict(main=layout(own, name)), objectives=("mlm",))

def rewriter(p: SimpleNamespace, decoder: int) -> Layout:
    sides = {f"{s}_{k}": v for s, n in (("encoder", p.layers), ("decoder", decoder))
             for k, v in (("layers", n), ("ffn_dim", 4*p.width), ("attention_heads", 4))}
    return layout(MBartConfig(vocab_size=p.vocab, d_model=p.width, max_position_embeddings=p.length + 8, **sides),
                  "MBartForConditionalGeneration")

def step(p: SimpleNamespace, lay: Layout, objective: str = "causal", frozen: tuple[str, ...] = ()) -> int:
    return costs(lay, Stage(1, objective=objective, frozen=frozen), p.length, p.batch)[0].flops

Trainings = tuple[Layout, list[tuple[float, int]]]     # the large model; steps and FLOPs of each kind of training

def of_clp(p: SimpleNamespace) -> Trainings:
    "Source and helper; at each horizon scratch by three rates, and ten arms."
    big = gpt2(p, p.width, p.layers); one = step(p, big)
    return big, [(p.source_steps + sum(p.horizons)*(len(p.rates) + len(p.arms)), one),
                 (p.helper_steps, step(p, gpt2(p, p.helper_width, p.helper_layers)))]

def of_growth(p: SimpleNamespace) -> Trainings:
    "The small model; scratch by three rates; at each share every arm, and the small model trained on for the same FLOPs."
    big, little = gpt2(p, p.width, p.layers), gpt2(p, p.small_width, p.small_layers)
    one, less, shares = step(p, big), step(p, little), sum(p.shares)
    arms = [a for a in p.arms if a != "zero"]           # not for a GPT-2
    return big, [(p.steps*(len(p.rates) + shares*len(arms)), one), (p.steps*shares*one/less, less), (p.small_steps, less)]

def of_metro(p: SimpleNamespace) -> Trainings:
    "Every arm but the random one costs what the masked LM does; steps are counted as its."
    big = masked(p, MPNetConfig)
    return big, [(p.steps*(len(p.arms) - 1), step(p, big, "mlm"))]

def of_sequential(p: SimpleNamespace) -> Trainings:
    "Masked LM; four seq2seq models from scratch; the fifth of an MLM; seven second stages with a sleeping encoder for a share of them."
    big, mlm = rewriter(p, p.layers), step(p, masked(p, BertConfig), "mlm")
    whole, asleep = step(p, big, "denoise"), step(p, big, "denoise", ("encoder/",))
    sleeping = p.two_steps*sum({"frozen": 1.0, "open": 0.0}.get(a) if "@" not in a else float(a.split("@")[1])
                               for a in p.arms if "@" in a or a in ("frozen", "open"))
    second = p.two_steps*sum("@" in a or a in ("frozen", "open") for a in p.arms)
    return big, [(p.mlm_steps*1.2, mlm), (2*p.seq_steps + second - sleeping, whole), (p.seq_steps, step(p, big, "spans")),
                 (p.seq_steps, step(p, rewriter(p, 2), "denoise")), (sleeping, asleep)]

def of_together(p: SimpleNamespace) -> Trainings:
    "Two small models; scratch by three rates; six chains of a half, three of which train for a fifth on the way."
    big, little = gpt2(p, p.width, p.layers), gpt2(p, p.small_width, p.small_layers)
    one, less = step(p, big), step(p, little)
    return big, [(p.steps*(len(p.rates) + 6*0.5 + 3*0.2), one), (p.small_steps + p.helper_steps, less)]

RECIPES = dict(clp=(clp, of_clp), sequential=(sequential, of_sequential), metro=(metro, of_metro), growth=(growth, of_growth),
               together=(together, of_together))

def row(name: str, peak: float, share: float) -> dict:
    module, count = RECIPES[name]
    p = SimpleNamespace(**module._SIZES["full"])
    if name == "sequential": p.two_steps = round(0.7*p.seq_steps)
    lay, trainings = count(p)
    N, whole = p.batch*p.length, lay.parts["main"] if hasattr(lay, "parts") else lay
    D, layers, weights = next(n for k, n in whole.sizes.items() if k.endswith("hidden")), sum(whole.layers.values()), sum(
        t.size for t in whole.stored().values())
    rate, launch = peak*1e12*share, 250*layers*5e-6
    total, large = sum(n*f for n, f in trainings), max(f for _, f in trainings)
    minutes = sum(n*max(f/rate, launch) for n, f in trainings)/60
    reference = max(p.horizons) if name == "clp" else p.seq_steps if name == "sequential" else p.steps
    return dict(recipe=name, layers=layers, width=D, parameters=weights, tokens_a_step=N, steps=round(sum(n for n, _ in trainings)),
                flops=float(f"{total:.4g}"), memory_GB=round((16*weights + 34*N*D*layers + 14*N*p.vocab)/1e9, 1),
                step_ms=round(1e3*large/rate, 2), launch_ms=round(1e3*launch, 2), minutes_by_flops=round(total/rate/60, 1),
                minutes=round(minutes, 1), fits_ten=bool(minutes <= 10),
                reference_minutes=round(reference*max(large/rate, launch)/60, 1), peak_tflops=peak, share=share)

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--peak", type=float, default=990); a.add_argument("--share", type=float, default=0.4)
    a.add_argument("--out", default="results/full.csv"); o = a.parse_args()
    table = pd.DataFrame([row(name, o.peak, o.share) for name in RECIPES])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()
