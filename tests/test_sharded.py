"""A model cut over two ranks is trained as a whole one is: the same losses, stopped and gone on with, some of it asleep, with a guard and accumulated parts; its checkpoint is whole."""
import json, os, random, subprocess, sys
import numpy as np
import torch
from seqwarm.core.checkpoint import Checkpoint
import train_sharded

def test_two_ranks_that_hold_parts_are_one(tmp_path):
    threads = torch.get_num_threads()
    got = subprocess.run([sys.executable, train_sharded.__file__, tmp_path, tmp_path/"cut", str(random.randint(20000, 60000))], capture_output=True, text=True,
                         env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert got.returncode == 0, got.stderr[-3000:]
    assert sorted(got.stdout.split("\n")[:2]) == ["stopped by SIGTERM at step 9, state kept; run again to resume"]*2
    try: one = train_sharded.small(str(tmp_path), str(tmp_path/"one"))
    finally: torch.set_num_threads(threads)
    [place] = (p for p in (tmp_path/"cut").iterdir() if not p.name.startswith("."))
    rows = json.loads((place/"history.json").read_text())
    assert [r["step"] for r in rows] == one.history.step.tolist() and place.name == one.path.parent.name
    assert np.allclose([r["loss"] for r in rows], one.history.loss, rtol=1e-4) and rows[-1]["loss"] < rows[0]["loss"]
    assert sorted(p.name for p in place.iterdir()) == [".lock", "history.json", "model"]
    cut, whole = Checkpoint(place/"model"), Checkpoint(one.path)
    assert cut.names == whole.names and cut.card.cost["tokens"] == one.card.cost["tokens"] and cut.config["architectures"] == ["GPT2LMHeadModel"]
    for n in whole.names:
        a, b = cut.read(n), whole.read(n)
        if n.endswith("c_attn.bias"): a[16:32] = b[16:32] = 0    # a key's bias has no gradient but rounding, which Adam blows up
        assert torch.allclose(a, b, atol=2e-3), (n, (a - b).abs().max())
