"""A trained network with its frozen ends, and how it draws."""
import contextlib
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.images import decode_images
from common.machine import autocast, compute_dtype, pick_device
from common.tensors import read_tensors, strip
from encoders import load_described_vae, load_text_encoder, load_vae, words_of
from model import MicroDiT
from model import sample as draw_latents
from training import checkpoint


@dataclass
class Pipeline:
    """Everything between a text and a picture."""
    net: MicroDiT
    vae: object
    text_encoder: object
    device: torch.device
    name: str  # run and step
    words: list  # what the stand-in text encoder was shown in training
    guidance_scale: float  # that of the run's own sample pictures
    dtype: torch.dtype  # the network's weights are float32 all the same
    offload: bool  # parts are on the device only while they are at work

    @property
    def size(self):
        """Return the side of its pictures in pixels."""
        return self.net.config.latent_size * self.vae.downsample

    @contextlib.contextmanager
    def at_work(self, part):
        """With offload, move net, vae or text_encoder to the device and back."""
        module = getattr(part, "model", part)  # a text encoder holds its module; the stand-ins have none
        moves = self.offload and isinstance(module, torch.nn.Module)
        if moves:
            module.to(self.device)
        yield
        if moves:
            module.to("cpu")


def load(path, device=None, *, vae="", text_encoder="", dtype="auto", offload="auto", compile=False):
    """Load the Pipeline of a checkpoint: a file, a run folder, or "" for the newest run."""
    path = checkpoint.find(path)
    (net, run), device = checkpoint.load_network(path), pick_device(device)
    data, dtype = run["data"], compute_dtype(dtype, device)
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 16e9
    offload = offload == "yes" or offload == "auto" and small
    home = torch.device("cpu") if offload else device
    if vae in ("", data["vae"]["name"]):
        carried = strip(read_tensors(path, ("vae.",))[1], "vae.") if "config" in data["vae"] else None
        vae = load_described_vae(data["vae"], home, dtype, carried)
    else:
        vae = load_vae(vae, home, dtype)
    if data["vae"].get("shift") is False:
        vae.shift = 0.0
    of_run, name = data["text_encoder"], text_encoder or data["text_encoder"]["name"]
    text_encoder = load_text_encoder(name, home, dtype, of_run.get("length", 0) if name == of_run["name"] else 0)
    if name == of_run["name"] and (text_encoder.about | of_run).get("sha256") != text_encoder.about.get("sha256"):
        raise ValueError(f"text encoder {name} is not the one that {path} was trained with: restore it, or give its "
                         "place with --text_encoder")
    for end, have, want in (("vae", vae.latent_channels, net.config.latent_channels),
                            ("text_encoder", text_encoder.dim, net.config.caption_dim)):
        if have != want:
            raise ValueError(f"the {end} gives {have} channels, {path} takes {want}: leave --{end} out")
    if compile:
        net.compile()
    return Pipeline(net.to(home).eval().requires_grad_(False), vae, text_encoder, device,
                    f"{path.parent.name}/{path.stem}", data.get("words", []),
                    run["settings"].get("sample_guidance", 5.0), dtype, offload)


def check_prompts(prompts, negative_prompts, seed):
    """Return (prompts, negative prompts, seeds), one of each for every picture."""
    both = prompts, negative_prompts
    prompts, negative = ([texts] if isinstance(texts, str) else list(texts or ()) for texts in both)
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(prompts))]
    negative = negative * len(prompts) if len(negative) == 1 else negative
    if not all(text.strip() for text in prompts + negative):
        raise ValueError("a prompt is empty: describe a picture")
    if len(negative) not in (0, len(prompts)) or len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(negative)} negative prompts, {len(seeds)} seeds do not match")
    return prompts, negative, seeds


def warn_of_unknown_words(pipeline, texts):
    """Name words that training never showed, each once."""
    new = sorted({*words_of(" ".join(texts))} - {*pipeline.words})
    if pipeline.words and new:
        rest = f" and {len(new) - 10} more" if len(new) > 10 else ""
        print(f"warning: {pipeline.name} was never shown the words {', '.join(new[:10])}{rest}. It was shown "
              + ", ".join(pipeline.words[:100]), file=sys.stderr)
        pipeline.words = [*pipeline.words, *new]


def generate(pipeline, prompts, *args, **options):
    """Return one PIL image per prompt; see draw."""
    return [image for batch in draw(pipeline, prompts, *args, **options) for image in batch]


def draw(pipeline, prompts, steps=30, guidance_scale=None, seed=2024, sampler="heun", negative_prompts=None, *,
         sigma_max=80.0, batch_size=16, progress=False):
    """Yield lists of pictures. Picture i starts from the noise of seed + i; seed may be a list, one for each."""
    prompts, negative, seeds = check_prompts(prompts, negative_prompts, seed)
    warn_of_unknown_words(pipeline, prompts + negative)
    p, c = pipeline, pipeline.net.config
    guidance = p.guidance_scale if guidance_scale is None else guidance_scale
    with tqdm(total=len(prompts) * steps, unit=" picture steps", disable=not progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            with p.at_work(p.text_encoder):
                caption, other = (p.text_encoder(texts[batch]).to(p.device) if texts else None
                                  for texts in (prompts, negative))
            noise = [torch.randn(c.latent_channels, c.latent_size, c.latent_size,
                                 generator=torch.Generator().manual_seed(s)) for s in seeds[batch]]
            with p.at_work(p.net), autocast(p.device, p.dtype):
                latents = draw_latents(p.net, torch.stack(noise).to(p.device), caption, steps, guidance, sampler,
                                       sigma_max=sigma_max, negative_caption=other,
                                       on_step=lambda denoised: bar.update(len(denoised)))
            with p.at_work(p.vae):
                images = decode_images(p.vae, latents)
            yield images
