"""What a classifier of texts has to beat: logistic regression on bags of words, on the split of its recipe.

python recipes/benchmarks/bag_of_words.py                    # measure
python recipes/benchmarks/bag_of_words.py --render           # write the table of README.md from results/
python recipes/benchmarks/bag_of_words.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring
from benchmarks.measuring import HERE
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm

from hf_r2.evaluation.data import load_splits
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- bag of words -->", "<!-- end of bag of words -->"
WORDS = r"\[MASK\]|\w+|[^\w\s]"
STRENGTHS = (1.0, 10.0, 100.0)
BAGS: dict[str, Any] = {
    "words": partial(CountVectorizer, token_pattern=WORDS, lowercase=False),
    "words 1–5, tf-idf": partial(
        TfidfVectorizer, token_pattern=WORDS, lowercase=False, ngram_range=(1, 5), min_df=3, sublinear_tf=True
    ),
    "characters 2–5, tf-idf": partial(
        TfidfVectorizer, analyzer="char_wb", lowercase=False, ngram_range=(2, 5), min_df=3, sublinear_tf=True
    ),
}


def measure(name: str, bags: Sequence[str]) -> dict[str, Any]:
    """Fit every bag with every strength; what measures best on the validation split is measured on the test split."""
    texts = {split: (list(data["text"]), list(data["label"])) for split, data in load_splits(name).items()}
    rows = []
    for bag in tqdm(bags, unit="bag"):
        fitted = [
            make_pipeline(BAGS[bag](), LogisticRegression(C=strength, max_iter=150, tol=1e-3)).fit(*texts["train"])
            for strength in STRENGTHS
        ]
        scores = [model.score(*texts["validation"]) for model in fitted]
        best = scores.index(max(scores))
        test = fitted[best].score(*texts["test"])
        rows.append({"bag": bag, "C": STRENGTHS[best], "validation": scores[best], "test": test})
    counts = {split: len(labels) for split, (_, labels) in texts.items()}
    return {**measuring.facts(threads=1), "data": name, "examples": counts, "rows": rows}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [(row["bag"], f"{row['C']:g}", f"{row['validation']:.1%}", f"{row['test']:.1%}") for row in rows]
    return markdown_table(("bag of", "C", "validation", "test"), cells)


def render(result: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {split}" for split, count in result["examples"].items())
    return (
        f"{result['data']} ({counts} examples), commit {result['commit']}, {result['date']}\n\n{table(result['rows'])}"
    )


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("bag-of-words-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="python-bracket-depth")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "bag_of_words.py")
    result = measure(options.data, list(BAGS))
    measuring.save(result, HERE / "results" / f"bag-of-words-{options.data}.json")
    print(render(result))


if __name__ == "__main__":
    main()
