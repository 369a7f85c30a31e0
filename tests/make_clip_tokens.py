"""
Makes tests/data/clip_tokens.json anew: open_clip's token ids of its captions, and what of CLIP's vocabulary they need.

    pip install --no-deps --target open_clip open_clip_torch==3.3.0 && pip install ftfy regex
    python tests/make_clip_tokens.py open_clip tests/data/clip_tokens.json

open_clip itself cannot be a test requirement, as it needs torchvision. Of the 48,894 merges only those are kept that a
caption used: byte pair encoding takes the earliest merge that applies, so captions come out the same without the rest.
"""

import gzip
import importlib.util
import json
import sys
from pathlib import Path


def used_merges(module, tokenizer, ranks, text):
    """Return the pairs of pieces that byte pair encoding joins in a caption."""
    used = set()
    for piece in tokenizer.pat.findall(module._clean_lower(text)):
        word = [tokenizer.byte_encoder[b] for b in piece.encode()]
        word[-1] += "</w>"
        while pairs := [p for p in zip(word, word[1:]) if p in ranks]:
            best = min(pairs, key=ranks.get)
            used.add(best)
            at = list(zip(word, word[1:])).index(best)  # the others of its kind follow in the next rounds
            word[at:at + 2] = ["".join(best)]
    return used


def main(folder, out):
    file = Path(folder) / "open_clip/tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer, texts = module.SimpleTokenizer(), json.loads(Path(out).read_text())["captions"]
    ids = [row[: max(i for i, t in enumerate(row) if t == 49407) + 1] for row in tokenizer(texts).tolist()]
    lines = gzip.open(file.parent / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
    ranks = {tuple(line.split()): i for i, line in enumerate(lines[1 : 49152 - 256 - 2 + 1])}
    used = set().union(*(used_merges(module, tokenizer, ranks, text) for text in texts))
    merges = [" ".join(p) for p in sorted(used, key=ranks.get)]
    letters = list(tokenizer.byte_encoder.values())
    kept = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    vocab = {token: tokenizer.encoder[token] for token in kept}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    data = {"open_clip": "3.3.0", "captions": texts, "ids": ids, "vocab": vocab, "merges": merges}
    Path(out).write_text(json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
