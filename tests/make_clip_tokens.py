"""
Makes tests/data/clip_tokens.json: captions, open_clip's token ids of them, and what of CLIP's vocabulary they need.

    pip install --no-deps --target open_clip open_clip_torch==3.3.0 && pip install ftfy regex
    python tests/make_clip_tokens.py open_clip tests/data/clip_tokens.json

open_clip itself cannot be a test requirement, as it needs torchvision. Of the 48,894 merges only those are kept that a
caption used: byte pair encoding takes the earliest merge that applies, so captions come out the same without the rest.
"""

import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

PLAIN = [
    "a photo of a cat", "dog barking", "A PHOTO OF A CAT.", "", " ", "!", "!!", "wow!", "wow !",
    "Wow!!! What a view!!!!",
    "it's a dog's life", "they're here; we've gone, I'd say he'll stay and I'm fine", "it’s curly",
    "“quoted” and ‘single’",
    "don`t", "a—b – c - d", "50% off!!", "$100 & £20 and €5",
    "C++ / C# @home #1", "(parentheses) [brackets] {braces}",
    "semi;colon:and,comma.", "...", "…", "a...b", "under_score and snake_case", "e-mail: someone@example.com",
    "https://example.com/a?b=c&d=e", "1234567890", "3.14159 and 2,718",
    "12:30 p.m.", "1/2 of 3x4", "x²+y²=z²", "½ cup",
    "a &amp; b", "&lt;b&gt;bold&lt;/b&gt;", "tom &amp;amp; jerry", "&quot;quoted&quot;", "it&#39;s", "caf&eacute;",
    "&nbsp;x",
    "<b>bold</b> & more", "5 < 6 and 7 > 4", "café", "cafe\u0301", "naïve façade über Ångström", "smörgåsbord",
    "crème brûlée",
    "ＦＵＬＬ ｗｉｄｔｈ！", "ﬁne ﬂour eﬃcient", "ĳs", "日本の風景",
    "北京的天空", "서울의 밤", "привет мир", "مرحبا",
    "שלום",
    "Ελλάδα", "नमस्ते", "สวัสดี", "😀",
    "a dog 🐶 and a cat 🐱!!", "👩‍👩‍👧‍👦 family", "🇫🇷 flag", "❤️ love",
    "thumbs 👍🏽 up",
    "tab\tand\nnewline\r\nand  spaces", "  leading and trailing  ", "zero\u200bwidth", "non\u00a0breaking",
    "soft\u00adhyphen",
    "bell\x07and\x00null", "\ufeffbom", "™ © ® ° § ¶ † ‡",
    "← ↑ → ↓", "α β γ δ", "∑ ∫ √ ∞ ≠", "ß ẞ straße",
    "İstanbul ı",
    "O'Neill's Pub", "rock 'n' roll", "'tis the season", "the 1980s'", "''double single''", '"', "'",
    "\\ back / slash |",
    "~tilde^caret=equals+plus", "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "! " * 100, "word " * 200, "🐶" * 60, "?!" * 50, "8k, uhd, ((masterpiece)), (best quality:1.2)",
    "--ar 16:9 --v 5",
    "by greg rutkowski, trending on artstation", "IMG_1234.JPG", "DSC00012", "<unknown>", "a\\nb",
]  # fmt: skip
SUBJECTS = ["an astronaut", "two dogs", "the old lighthouse", "a bowl of ramen", "Times Square",
            "my grandmother's garden",
            "a vintage car", "several hot-air balloons", "an oil painting of Paris", "a close-up of a bee"]  # fmt: skip
ENDINGS = [" riding a horse on the moon!", ", 35mm film, f/1.8", " in the rain…", " at sunset; golden hour.",
           " (2019)",
           " – stock photo", " next to a “No Parking” sign", " & friends", " wearing sunglasses 😎",
           " in 4K"]  # fmt: skip


def captions():
    rng = random.Random(0)
    words = "the a of red blue sky mountain person standing beside river bright quiet street under large small".split()
    long = [" ".join(rng.choice(words) for _ in range(n)) for n in (70, 74, 75, 76, 77, 100, 200)]
    return PLAIN + [s + e for s in SUBJECTS for e in ENDINGS] + long


def main(folder, out):
    file = Path(folder) / "open_clip/tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.SimpleTokenizer()
    texts = captions()
    ids = [row[: max(i for i, t in enumerate(row) if t == 49407) + 1] for row in tokenizer(texts).tolist()]

    lines = gzip.open(file.parent / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
    ranks = {tuple(line.split()): i for i, line in enumerate(lines[1 : 49152 - 256 - 2 + 1])}
    used = set()
    for text in texts:
        clean = module._clean_lower(text)
        for piece in tokenizer.pat.findall(clean):
            word = [tokenizer.byte_encoder[b] for b in piece.encode()]
            word[-1] += "</w>"
            while pairs := [p for p in zip(word, word[1:]) if p in ranks]:
                best = min(pairs, key=ranks.get)
                used.add(best)
                merged, i = [], 0
                while i < len(word):
                    both = tuple(word[i : i + 2]) == best
                    merged.append(word[i] + word[i + 1] if both else word[i])
                    i += 1 + both
                word = merged
    merges = [" ".join(p) for p in sorted(used, key=ranks.get)]
    letters = list(tokenizer.byte_encoder.values())
    kept = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    vocab = {token: tokenizer.encoder[token] for token in kept}
    vocab |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    data = {"open_clip": "3.3.0", "captions": texts, "ids": ids, "vocab": vocab, "merges": merges}
    Path(out).write_text(json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(texts)} captions, {len(merges)} merges, {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
