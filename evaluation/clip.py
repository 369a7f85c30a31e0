"""CLIP's projected features of pictures and texts, for CLIP score, CLIP-FID and GenEval's colours."""
import torch

from common.files import reading
from common.tensors import tensors_hash
from encoders.hub import load_pretrained, load_tokenizer
from encoders.text import TextEncoder


class Clip:
    """Both towers in float32, and what prepares pictures as the model's files say"""
    longer, is_clip = TextEncoder.longer, True

    def __init__(self, name, device="cpu"):
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        with reading(name, ": give the hub id or folder of a CLIP model, with its image processor and tokenizer"):
            self.name, self.model = name, load_pretrained(CLIPModel, name, dtype=torch.float32).to(device)
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
            self.tokenizer = load_tokenizer(CLIPTokenizer, name)
        self.side, self.width = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self.about = {"network_sha256": tensors_hash(self.model)}
        self.length = self.model.config.text_config.max_position_embeddings

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
        batch = self.tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True,
                               return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**batch).pooler_output
