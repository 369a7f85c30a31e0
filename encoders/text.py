"""Text encoders: token embeddings of CLIP, T5 and others, through transformers, and "words", a stand-in for them."""
import functools
import hashlib
import html
import re
import sys
import unicodedata

import torch

from common.files import reading
from common.machine import compute_dtype, without_float16
from common.tensors import tensors_hash
from encoders.hub import BY_HAND, fetch, load_pretrained, load_tokenizer, local, reach_hub

QUICK_GELU = ("dfn5b", "dfn2b", "openai/clip")  # models that were trained with x * sigmoid(1.702 x)
OTHERS = r"(vision_model|visual_projection|text_projection|logit_scale|lm_head).*"  # weights that are not wanted
# what ftfy repairs for open_clip: quotes, ligatures, full-width forms and control characters
LIGATURES = [*range(0xFB00, 0xFB07), 0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]
CONTROLS = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
REPAIRS = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*LIGATURES, 0x3000, *range(0xFF01, 0xFFF0))}
REPAIRS |= dict.fromkeys(CONTROLS) | dict.fromkeys(map(ord, "’‘‚‛ʼ"), "'") | dict.fromkeys(map(ord, "“”„‟"), '"')
# and control characters that were meant as Windows-1252
REPAIRS |= {c: (bytes([c]).decode("windows-1252", "ignore") or chr(c)).translate(REPAIRS) for c in range(0x80, 0xA0)}


def clean(text):
    """Return a caption as open_clip's tokenizer sees it: repaired, unescaped, one space between words, lower case."""
    text = text if "<" in text else html.unescape(text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text.translate(REPAIRS))))
    return " ".join(text.split()).lower()


class TextEncoder:
    """Captions -> (B, length, dim): the last hidden state of all tokens, also of CLIP's and T5's padding.

    Of other models the padding is zero. length: tokens of a caption; 0: as many as CLIP reads, 120 (T5) or 256.
    """

    def __init__(self, name, device, dtype, length=0):
        import transformers  # which takes seconds
        place, tokens = find_text_encoder(name)
        config = transformers.AutoConfig.from_pretrained(place)
        encodes = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # of T5 and its like the encoder alone
        self.name, self.is_clip = name, config.model_type in ("clip", "clip_text_model")
        self.pads_with_zeros = not self.is_clip and config.model_type != "t5"
        tokenizer = transformers.CLIPTokenizer if self.is_clip else transformers.AutoTokenizer
        self.tokenizer = load_tokenizer(tokenizer, tokens)
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = (transformers.CLIPTextModel if self.is_clip else transformers.AutoModelForTextEncoding if encodes else
                 transformers.AutoModel)
        self.model = load_pretrained(model, place, OTHERS)
        sha256 = tensors_hash(self.model)  # of the weights as they are in the file
        self.model = self.model.to(device, dtype if self.is_clip else without_float16(dtype))
        config = self.model.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)  # T5 has no such limit
        self.length = length or (most if self.is_clip else 256 if self.pads_with_zeros else 120)
        if most and self.length > most:
            raise ValueError(f"it reads {most} tokens, and caption_length is {self.length}")
        self.dim = config.hidden_size
        self.about = {"length": self.length, "dim": self.dim, "sha256": sha256}
        if any(part in name.lower() for part in QUICK_GELU) and config.hidden_act != "quick_gelu":
            raise ValueError(f"its config says hidden_act {config.hidden_act}, but it was trained with quick_gelu")

    def tokens(self, captions):
        """Return token ids (B,L) of cleaned captions for CLIP; for others ids of captions as they are, and a mask."""
        batch = self.tokenizer([clean(c) if self.is_clip else c for c in captions], padding="max_length",
                               max_length=self.length, truncation=True, return_tensors="pt").to(self.model.device)
        if self.is_clip:  # padded with 0 as by open_clip, and not masked: the released network attends to the padding
            return {"input_ids": batch["input_ids"] * batch["attention_mask"]}
        return batch

    def longer(self, captions):
        """Return how many of the captions are longer than it reads."""
        ids = self.tokenizer([clean(c) if self.is_clip else c for c in captions or [""]])["input_ids"]
        return sum(len(tokens) > self.length for tokens in ids)

    @torch.no_grad()
    def __call__(self, captions):
        tokens = self.tokens(captions)
        hidden = self.model(**tokens).last_hidden_state.float()
        if self.pads_with_zeros:  # not multiplied: a caption without any token may give NaN
            hidden = hidden.masked_fill(tokens["attention_mask"].unsqueeze(-1) == 0, 0)
        return hidden


class Words:
    """Stand-in without weights: for each word a vector plus its position's, as the network adds none: (B, 16, 128)."""
    dim = 128

    def __init__(self, device="cpu", length=0):
        self.device, self.length = device, length or 16
        self.about = {"length": self.length, "dim": self.dim}

    def longer(self, captions):
        return sum(len(words_of(caption)) > self.length for caption in captions)

    def __call__(self, captions):
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions):
            for i, word in enumerate(words_of(caption)[:self.length]):
                row[i] = (vector_of(word) + vector_of(f"position {i}")) * 0.5 ** 0.5  # no word contains a space
        return out.to(self.device)


@functools.cache
def vector_of(text):
    """Return uniform numbers of unit variance, made from a hash of the text alone."""
    digest = hashlib.shake_256(text.encode()).digest(Words.dim)
    return (torch.tensor(list(digest), dtype=torch.float32) - 127.5) / 73.9


def words_of(caption):
    """Return the lower-case words of a caption, without punctuation."""
    return re.findall(r"[^\W_]+", caption.lower())


def find_text_encoder(name):
    """Return where a text encoder and its tokenizer are, as folders or hub ids, those of a pipeline too."""
    place, inside = local(name) and local(name).absolute(), "/".join(name.split("/")[2:])
    if not place:
        reach_hub()
        if not inside:
            return name, name
        parts, endings = (inside, inside.replace("text_encoder", "tokenizer")), ("json", "txt", "model", "safetensors")
        place = fetch(name, [f"{part}/*.{ending}" for part in parts for ending in endings]) / inside
    place = place / "text_encoder" if (place / "text_encoder").exists() else place
    tokens = place.with_name(place.name.replace("text_encoder", "tokenizer"))
    if not (place / "config.json").exists() and (place.is_file() or [*place.glob("open_clip*")]):
        raise ValueError("it is a file, or in open_clip's format: give a folder of transformers, with the tokenizer")
    return str(place), str(tokens if tokens.is_dir() else place)


def warn_of_cut(count, encoder):
    if count:
        print(f"warning: {count:,} of the captions are longer than the {encoder.length} tokens that the text encoder "
              "reads: their ends are cut off", file=sys.stderr)


def load_text_encoder(name, device="cpu", dtype=None, length=0):
    """Load "words", or a model of a folder or hub id; dtype None is what compute_dtype("auto") says.

    length: tokens of a caption; 0: as many as the model's kind has.
    """
    if name == "words":
        return Words(device, length)
    with reading(f"text encoder {name}", BY_HAND):
        return TextEncoder(str(name), device, dtype or compute_dtype("auto", torch.device(device)), length)
