"""
Text encoders of published models, through transformers: CLIP's and T5's token embeddings.

    encode = load("apple/DFN5B-CLIP-ViT-H-14-378")      # a hub id or a folder; "t5" models likewise
    embeddings = encode(["a photo of a cat"])           # (B, 77, 1024)
"""
import html
import json
import unicodedata
from pathlib import Path

import torch

QUICK_GELU = ("apple/dfn", "openai/clip")  # models that were trained with x * sigmoid(1.702 x)
T5_LENGTH = 120
# what ftfy, which open_clip uses, repairs: quotes, ligatures, full-width forms, control characters (but not mojibake)
LIGATURES = [*range(0xFB00, 0xFB07), 0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4)]
CONTROLS = [*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
REPAIRS = {c: unicodedata.normalize("NFKC", chr(c)) for c in (*LIGATURES, 0x3000, *range(0xFF01, 0xFFF0))}
REPAIRS |= dict.fromkeys(CONTROLS) | dict.fromkeys(map(ord, "’‘‚‛ʼ"), "'")
REPAIRS |= dict.fromkeys(map(ord, "“”„‟"), '"')
# control characters that were meant as Windows-1252
REPAIRS |= {c: (bytes([c]).decode("windows-1252", "ignore") or chr(c)).translate(REPAIRS) for c in range(0x80, 0xA0)}


def clean(text):
    """Return a caption as open_clip's tokenizer sees it: repaired, unescaped, one space between words, lower case."""
    if "<" not in text:
        text = html.unescape(text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text.translate(REPAIRS))))
    return " ".join(text.split()).lower()


class CLIP:
    """Captions -> (B,77,width): the tokens after the final layer norm, all of them, the padding too."""
    clean = staticmethod(clean)

    def __init__(self, name, device, dtype):
        from transformers import CLIPTextModel, CLIPTokenizer
        self.name, self.tokenizer = str(name), CLIPTokenizer.from_pretrained(name)
        self.model = CLIPTextModel.from_pretrained(name, dtype=dtype).to(device).eval().requires_grad_(False)
        self.length, self.dim = self.model.config.max_position_embeddings, self.model.config.hidden_size
        if needs_quick_gelu(name) and self.model.config.hidden_act != "quick_gelu":
            raise ValueError(f"its config says hidden_act {self.model.config.hidden_act}, but it was trained with "
                             "quick_gelu: every embedding would be slightly wrong. Mend its config.json")

    def tokens(self, captions):
        """Return token ids and attention mask, each (B,L)."""
        return self.tokenizer([self.clean(c) for c in captions], padding="max_length", max_length=self.length,
                              truncation=True, return_tensors="pt").to(self.model.device)

    def ids(self, captions):
        """Return the token ids (B,77) as open_clip's, padded with 0. A pad token of its own would change "!"."""
        batch = self.tokens(captions)
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)

    @torch.no_grad()
    def __call__(self, captions):
        # no attention mask: the released network attends to the padding too, so it must be what it was in training
        return self.model(self.ids(captions)).last_hidden_state.float()


class T5(CLIP):
    """Captions -> (B,120,width): the encoder's last hidden state; padding is masked inside and kept in the output."""
    clean = str  # T5 tells capitals and quotes apart, and the paper's code gives it captions as they are

    def __init__(self, name, device, dtype):
        from transformers import AutoTokenizer, T5EncoderModel
        self.name, self.tokenizer = str(name), AutoTokenizer.from_pretrained(name)
        self.model = T5EncoderModel.from_pretrained(name, dtype=dtype).to(device).eval().requires_grad_(False)
        self.length, self.dim = T5_LENGTH, self.model.config.d_model

    @torch.no_grad()
    def __call__(self, captions):
        return self.model(**self.tokens(captions)).last_hidden_state.float()


def load(name, device="cpu", dtype=None):
    """Load the text encoder of a hub id or folder; dtype None is bfloat16 on a GPU and float32 elsewhere."""
    from transformers import AutoConfig
    from transformers.utils import logging
    logging.set_verbosity_error()  # a whole CLIP model holds a vision tower too, which is no news
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in ("clip", "clip_text_model", "t5"):
            raise ValueError(f"it is of the kind {kind}: CLIP and T5 are understood")
        encoder = (T5 if kind == "t5" else CLIP)(name, device, dtype)
        check_tokenizer(encoder.tokenizer, encoder.model.config)
        return encoder
    except (OSError, ImportError) as error:
        raise ValueError(f"text encoder {name}: it is neither a folder here nor could it be fetched from the hub "
                         f"({type(error).__name__}: {str(error).strip().splitlines()[0]})") from None
    except ValueError as error:
        raise ValueError(f"text encoder {name}: {error}") from None


def check_tokenizer(tokenizer, config):
    """Raise ValueError if a tokenizer gives numbers that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(f"its tokenizer counts tokens up to {largest:,}, its model has {config.vocab_size:,}: they do "
                         "not belong together")


def needs_quick_gelu(name):
    """Return whether the model's name, or the open_clip config beside its weights, says so."""
    config = Path(name) / "open_clip_config.json"
    if config.is_file():
        model = json.loads(config.read_text(encoding="utf-8")).get("model_cfg", {})
        return bool(model.get("quick_gelu") or "quickgelu" in str(model.get("text_cfg", {})))
    return str(name).lower().startswith(QUICK_GELU)
