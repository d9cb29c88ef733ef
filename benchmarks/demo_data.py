"""Prepare the demo model's text: `python benchmarks/demo_data.py prose.jsonl.gz OUT`.

Reads a jsonl of public-domain English (`id`, `text`, `simple`) and writes simple.jsonl.gz and other.jsonl.gz (the
novels to train on, simple ones to be read first) and heldout.jsonl.gz. A training novel that shares long passages with
a held-out one (the same book from another collection) is left out and named.
"""

import gzip
import json
import re
import sys
from pathlib import Path

NOVELS = ("novels100/", "eltec/", "britfic/", "janeausten/")
# Every eleventh of the simple novels in the order of their ids, so that no taste chose them; one per author.
HELD_OUT_STRIDE = 11
SHINGLE = 12  # words; two different novels of one period share almost none this long
SHARED_LIMIT = 0.01


def shingles(text: str) -> set[int]:
    words = re.findall(r"[a-z]+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE)}


def main(source: Path, out: Path) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        novels = [doc for doc in map(json.loads, lines) if doc["id"].startswith(NOVELS)]
    simple = [doc for doc in novels if doc["simple"]]
    held_out = simple[5::HELD_OUT_STRIDE]
    held_ids = {doc["id"] for doc in held_out}
    seen = set().union(*(shingles(doc["text"]) for doc in held_out))
    groups: dict[str, list[dict[str, str]]] = {"heldout": held_out, "simple": [], "other": []}
    for doc in novels:
        if doc["id"] in held_ids:
            continue
        own = shingles(doc["text"])
        if len(own & seen) > SHARED_LIMIT * len(own):
            print(f"left out, shares text with a held-out novel: {doc['id']}")
            continue
        groups["simple" if doc["simple"] else "other"].append(doc)
    out.mkdir(parents=True, exist_ok=True)
    for name, docs in groups.items():
        with gzip.open(out / f"{name}.jsonl.gz", "wt", encoding="utf-8", compresslevel=3) as file:
            for doc in docs:
                file.write(json.dumps({"id": doc["id"], "text": doc["text"]}) + "\n")
        print(f"{name}: {len(docs)} novels, {sum(len(doc['text'].encode()) for doc in docs):,} bytes")
    print("held out:", *(doc["id"] for doc in held_out), sep="\n  ")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
