"""Continuations of held-out openings, for the demo model's card: python benchmarks/continuations.py MODEL TEXT.jsonl.gz

Openings are the first sentences of chapters; sampling is temperature 0.8, top-p 0.95, seed 0. All of them are kept, so
that a choice of best and worst can be checked.
"""

import argparse
import re
import tempfile
from pathlib import Path

from report import machine, write
from tokenizers import Tokenizer

from tolserve.engine.assemble import assemble, use_threads
from tolserve.engine.config import EngineSettings
from tolserve.engine.request import Delta, Request, SamplingParams
from tolserve.train.data import read_documents

NEW_TOKENS = 90


def openings(text: Path, per_document: int) -> list[str]:
    """The start of every n-th chapter of each document, up to a sentence's end after 120 characters."""
    found = []
    for document in read_documents(text):
        starts = [m.end() for m in re.finditer(r"\n(?:CHAPTER|Chapter) [^\n]*\n(?:[^\n]{1,60}\n)?", document)]
        starts = starts[:: max(1, len(starts) // per_document)][:per_document] or [len(document) // 3]
        for start in starts:
            sentence = re.match(r".{120,}?[.!?]\"?(?=\s)", document[start : start + 1500].strip(), re.DOTALL)
            if sentence:
                found.append(sentence.group())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--per-document", type=int, default=6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = openings(args.text, args.per_document)
    answers: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as cache:
        engine = assemble(EngineSettings(model=str(args.model), cache_dir=cache))
        for index, text in enumerate(texts):
            sampling = SamplingParams(NEW_TOKENS, temperature=0.8, top_p=0.95, seed=0, choice=index)
            ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
            engine.add(Request(str(index), ids, sampling))
        while engine.busy:
            for output in engine.step():
                if isinstance(output, Delta):
                    answers.setdefault(output.request_id, []).extend(output.tokens)
        engine.close()
    pairs = [
        {"opening": text, "continuation": tokenizer.decode(answers[str(index)])} for index, text in enumerate(texts)
    ]
    write(machine() | {"continuations": pairs}, args.out)


if __name__ == "__main__":
    main()
