"""The frozen ends of the model: an autoencoder between pictures and latents, a text encoder for captions."""
from encoders.text import load_text_encoder, warn_of_cut, words_of
from encoders.vae import describe_vae, load_described_vae, load_vae

__all__ = ["describe_vae", "load_described_vae", "load_text_encoder", "load_vae", "warn_of_cut", "words_of"]
