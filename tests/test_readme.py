"""README and results say what the records say."""
import json, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
RECORDS = {p.stem: json.loads(p.read_text()) for p in sorted((ROOT/"results").glob("*-*.json"))}

def test_readme_is_the_index_as_it_runs(tmp_path):
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "markdown", "--execute", "--no-input", "--output-dir", tmp_path, "--output", "README", "nbs/index.ipynb"],
                   cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path/"README.md").read_text() == (ROOT/"README.md").read_text(), "run make readme"

@pytest.mark.parametrize("name", RECORDS)
def test_the_table_of_results_is_that_of_the_records(name):
    recipe, _, run = name.partition("-")
    table = pd.read_csv(ROOT/"results"/f"{recipe}.csv").query("run == @run").drop(columns="run").reset_index(drop=True)
    record = pd.DataFrame(RECORDS[name]["table"]).round(5)
    pd.testing.assert_frame_equal(table[record.columns], record, check_dtype=False)

def test_the_claims_of_records_are_what_their_tables_say():
    sys.path.insert(0, str(ROOT/"benchmarks"))
    from collect import judged, plain
    for name, record in RECORDS.items():
        found = plain(judged(record))
        assert record["claims"] == pytest.approx(found["claims"], abs=1e-9), name
        assert record.get("by_seed", found["by_seed"]) == found["by_seed"], name

def test_pictures_of_the_readme_are_there():
    text = (ROOT/"README.md").read_text()
    pictures = [part.split(")")[0] for part in text.split("](") if part.split(")")[0].endswith(".svg")]
    assert pictures and all((ROOT/p).is_file() for p in pictures)
