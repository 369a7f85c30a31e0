"""
CLIP's projected features of pictures and texts, through transformers: for CLIP score, CLIP-FID and GenEval's colours.

    clip = Clip("openai/clip-vit-base-patch16")        # a hub id or a folder
    clip.image(pictures), clip.text(captions)           # (B, D) each, not normalised
"""
import torch

from common.hashing import tensors_hash
from encoders.text import check_tokenizer


def load_model(kind, name, model_type, architecture):
    """Return a float32 model of transformers by hub id or folder. Refuse one that is missing, cut, or another kind."""
    from transformers import AutoConfig
    from transformers.utils import logging
    logging.set_verbosity_error()  # a checkpoint's stale buffers are no news
    logging.disable_progress_bar()
    try:
        named = AutoConfig.from_pretrained(name).model_type
        if named != model_type:
            raise ValueError(f"it is of the kind {named}, {model_type} is wanted")
        model, report = architecture.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{kind} {name} cannot be loaded from a folder here or from the hub: {error}") from None
    # Missing weights would silently be random. Those of a training loss (criterion) are of no use here.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("criterion."))
    if missing:
        raise ValueError(f"{kind} {name}: its file lacks {len(missing)} weights: {', '.join(missing[:3])}")
    return model.eval().requires_grad_(False)


class Clip:
    """Both towers in float32. Pillow prepares pictures as the model's files say (OpenAI's: bicubic, centre)."""

    def __init__(self, name, device="cpu"):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        self.model = load_model("CLIP model", name, "clip", CLIPModel).to(device)
        try:
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
            self.tokenizer = CLIPTokenizer.from_pretrained(name)
            check_tokenizer(self.tokenizer, self.model.config.text_config)
        except (OSError, ValueError) as error:
            raise ValueError(f"CLIP model {name} lacks a fitting image processor or tokenizer: {error}") from None
        self.name, self.length = str(name), self.model.config.text_config.max_position_embeddings
        self.side = self.model.config.vision_config.image_size
        self.width, self.about = self.model.config.projection_dim, {"network_sha256": tensors_hash(self.model)}

    def prepare(self, picture):
        """Return a PIL picture as the image tower wants it, (3, side, side)."""
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def image(self, pictures):
        """Return the features (B, D) of PIL pictures, or of what prepare() made of them."""
        pixels = torch.stack([p if torch.is_tensor(p) else self.prepare(p) for p in pictures])
        return self.model.get_image_features(pixel_values=pixels.to(self.model.device)).pooler_output

    @torch.no_grad()
    def text(self, texts):
        """Return the features (B, D) of texts, which are cut after 77 tokens."""
        batch = self.tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True,
                               return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**batch).pooler_output


def clip_scores(images, texts):
    """Return the CLIP scores (B,) of features (B, D) row by row: 100 times the cosine, and at least 0."""
    return (100 * torch.nn.functional.cosine_similarity(images.double(), texts.double())).clamp_min(0)
