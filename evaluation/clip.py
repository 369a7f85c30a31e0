"""CLIP's projected features of pictures and texts, for CLIP score, CLIP-FID and GenEval's colours."""
import torch

from common.files import reading
from common.tensors import tensors_hash


def load_model(name, architecture):
    """Return a float32 model of transformers by hub id or folder. Refuse one that lacks weights."""
    from transformers.utils import logging
    logging.set_verbosity_error()  # a checkpoint's stale buffers are no news
    logging.disable_progress_bar()
    with reading(name, ": give the hub id or the folder of another model"):
        model, report = architecture.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        # Missing weights would silently be random. Those of a training loss (criterion) are of no use here.
        if missing := sorted(key for key in report["missing_keys"] if not key.startswith("criterion.")):
            raise ValueError(f"it lacks {len(missing)} weights of {architecture.__name__}: {', '.join(missing[:3])}")
    return model.eval().requires_grad_(False)


class Clip:
    """Both towers in float32, and what prepares pictures as the model's files say"""

    def __init__(self, name, device="cpu"):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        self.name, self.model = name, load_model(name, CLIPModel).to(device)
        with reading(name, ": a CLIP model needs its own image processor and tokenizer"):
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
            self.tokenizer = CLIPTokenizer.from_pretrained(name)
        self.side, self.width = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self.about = {"network_sha256": tensors_hash(self.model)}

    def prepare(self, picture):
        """Return a PIL picture as the image tower wants it, (3, side, side)."""
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def image(self, prepared):
        """Return the features (B, D), not normalised, of what prepare() made of pictures."""
        return self.model.get_image_features(pixel_values=torch.stack(prepared).to(self.model.device)).pooler_output

    @torch.no_grad()
    def text(self, texts):
        """Return the features (B, D), not normalised, of texts, which are cut after 77 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True,
                               return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**batch).pooler_output
