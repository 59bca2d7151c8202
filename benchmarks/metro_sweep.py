"""Single METRO encoders at many settings of the recipe, a line of JSON each on standard input; a row each in results/metro_sweep.csv.

    python benchmarks/metro_sweep.py world STORE < settings.jsonl           a line: {"arms": ["mlm", "mlm+fast.frozen"], "rtd": 5}
    python benchmarks/metro_sweep.py multi30k STORE DATA < settings.jsonl   DATA: a folder with multi30k, ud and snips
"""
import json, sys
from pathlib import Path
import pandas as pd
import torch
from seqwarm.core.text import Text
from seqwarm.recipes.metro import Models, measure, sized

OUT = Path(__file__).resolve().parents[1]/"results"/"metro_sweep.csv"
USUAL = dict(sleeping=True, kind="mpnet", mask_rate=0.15, apart=1.0, rtd=50.0, clm=1.0, heat=2.0, tau=0.1, ahead=0.1,
             before=0.5, heads=4, seeds=[0])
NONE = ("valid", "auxiliary", "tasks", "arms", "ramp", "prior", "auxiliary_rate", "exit_every", "exit_threshold", "exit_by", "exit_flops")

def wished(which: str, data: str) -> dict:
    "The text of a sweep, and its probes."
    if which == "world":
        return dict(text="world:a?words=3000000 + world:b?words=3000000", words=3_000_000, tasks=["pos", "entities", "topic", "entailment"])
    tags = lambda file, labels: f"tags:{data}/{file}.jsonl.gz?tokens=tokens&labels={labels}"
    label = lambda file: f"labels:{data}/snips/{file}.jsonl.gz?text=tokens&label=intent"
    both = lambda part: " + ".join(f"text:{data}/multi30k/{part}.{x}.txt.gz?lang={x}" for x in ("en", "de"))
    return dict(text=both("train"), valid=both("valid"), vocab=1000,
                tasks=[f"pos: {tags('ud/en_ewt.train', 'upos')} -> "
                       f"en={tags('ud/en_ewt.test', 'upos')}, de={tags('ud/de_gsd.test', 'upos')}",
                       f"slots: {tags('snips/train', 'slots')} -> en={tags('snips/test', 'slots')}",
                       f"intent: {label('train')} -> en={label('test')}"])

def main(which: str, store: str, data: str = "data") -> None:
    torch.set_num_threads(1)
    texts = {}
    for wish in map(json.loads, filter(str.strip, sys.stdin)):
        p = sized("demo", **dict.fromkeys(NONE) | USUAL | wished(which, data) | wish)
        if (key := (p.text, p.length, p.vocab)) not in texts: texts[key] = Text(p.text, p.valid, p.length, p.vocab)
        for seed, arm in ((s, a) for s in p.seeds for a in p.arms):
            found = measure(Models(p, Path(store), texts[key], seed), arm)
            probes = {k: v for k, v in found.items() if "/" in k}
            row = dict(text=which) | {f"wish_{k}": v for k, v in wish.items() if k not in ("arms", "seeds")}
            row |= {k: v for k, v in found.items() if k not in probes}
            awake = {k: v for k, v in probes.items() if ", frozen/" not in k}
            row |= dict(points=pd.Series(probes).mean(), tuned=pd.Series(awake).mean())
            known = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame()
            pd.concat([known, pd.DataFrame([row])]).round(5).to_csv(OUT, index=False)
            print(f"{which} {arm} {wish}: {row['points']:.2f}", flush=True)

if __name__ == "__main__": main(*sys.argv[1:])
