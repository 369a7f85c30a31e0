"""
A trained network with its frozen ends, and how it draws.

    pipeline = load("runs/tiny")
    pictures = generate(pipeline, ["a small red circle on a white background"])
"""
import contextlib
import sys
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from common.images import decode_images
from common.machine import pick_device
from encoders import load_described_vae, load_text_encoder, load_vae
from model import MicroDiT
from model import sample as draw_latents
from training import checkpoint

GROUP = 256  # with offload: pictures per round, so that the parts move to the GPU rarely


@dataclass
class Pipeline:
    """Holds everything between a text and a picture."""
    net: MicroDiT
    vae: object
    text_encoder: object
    device: torch.device
    name: str = ""                              # run and step
    words: list = field(default_factory=list)   # what the stand-in text encoder was shown in training
    guidance_scale: float = 5.0                 # that of the run's own sample pictures
    dtype: torch.dtype = torch.float32          # of the computation; the network's weights stay float32, as in training
    offload: bool = False                       # on the device only while at work

    @property
    def size(self):
        """Return the side of its pictures in pixels."""
        return self.net.config.latent_size * self.vae.downsample

    def autocast(self):
        """Compute the network in the precision of training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @contextlib.contextmanager
    def at_work(self, part):
        """Move net, vae or text_encoder to the device; with offload, back to the CPU afterwards."""
        module = getattr(part, "model", part)  # a text encoder holds its module; the stand-ins have none
        if not self.offload or not isinstance(module, torch.nn.Module):
            yield
            return
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")


def load(path, device=None, *, ema=True, vae="", text_encoder="", dtype="auto", offload="auto", compile=False,
         scaling_factor=0.0):
    """Load the Pipeline of a checkpoint: a file, a run folder, or "" for the newest run.

    vae, text_encoder: others than the checkpoint names. ValueError says what is missing or does not fit.
    """
    if dtype not in ("auto", "bfloat16", "float32") or offload not in ("auto", "yes", "no"):
        raise ValueError(f"dtype is '{dtype}', offload '{offload}': they must be auto, bfloat16 or float32, and auto, "
                         "yes or no")
    path = checkpoint.find(path)
    net, run = checkpoint.load_network(path, ema)
    data, device = run["data"], pick_device(device)
    dtype = getattr(torch, dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 16e9
    offload = offload == "yes" or offload == "auto" and small
    home = torch.device("cpu") if offload else device
    if vae in ("", data["vae"]["name"]):
        about = data["vae"] | ({"scaling_factor": scaling_factor} if scaling_factor else {})
        tensors = checkpoint.strip(checkpoint.read(path, ("vae.",))[1], "vae.") if "config" in about else None
        autoencoder = load_described_vae(about, home, dtype, tensors)
    else:
        autoencoder = load_vae(vae, home, dtype, scaling_factor or None)
    pipeline = Pipeline(
        net.to(home).eval().requires_grad_(False),
        autoencoder,
        load_text_encoder(text_encoder or data["text_encoder"]["name"], home, dtype),
        device, f"{path.parent.name}/{path.stem}", data.get("words", []), run["settings"].get("sample_guidance", 5.0),
        dtype, offload)
    check_ends(pipeline, released="released" in run)
    if compile:
        net.compile()
    return pipeline


def check_ends(pipeline, released):
    """Raise a ValueError if autoencoder or text encoder give other shapes than the network was trained on."""
    vae, text, config = pipeline.vae, pipeline.text_encoder, pipeline.net.config
    if released and getattr(vae, "shift", 0):
        print(f"note: the released networks were trained without the shift of {vae.shift} in the config of {vae.name}: "
              "none is applied", file=sys.stderr)
        vae.shift = 0.0
    for end, have, want in (("vae", vae.latent_channels, config.latent_channels),
                            ("text_encoder", text.dim, config.caption_dim)):
        if have != want:
            raise ValueError(f"the {end} gives {have} channels, the network of {pipeline.name} was trained with "
                             f"{want}: leave --{end} out")


def check_prompts(prompts, negative_prompts, seed):
    """Return (prompts, negative prompts, seeds), one of each for every picture; ValueError if they do not fit."""
    prompts = list(prompts)
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(prompts))]
    negative = [negative_prompts] if isinstance(negative_prompts, str) else list(negative_prompts or [])
    negative = negative * len(prompts) if len(negative) == 1 else negative
    for kind, texts in (("prompt", prompts), ("negative prompt", negative)):
        for i, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"{kind} {i + 1} is empty: describe a picture")
    if len(negative) not in (0, len(prompts)) or len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(negative)} negative prompts, {len(seeds)} seeds: give one for "
                         "each prompt")
    return prompts, negative, seeds


def generate(pipeline, prompts, steps=30, guidance_scale=None, seed=2024, sampler="heun", **options):
    """Return one PIL image per prompt. Picture i starts from noise that depends on seed + i alone.

    guidance_scale None: that of the run's own sample pictures. seed may be a list, one for each picture.
    options: negative_prompts (one for each prompt, or one for all), sigma_max, batch_size, progress (see draw).
    """
    return [image for batch in draw(pipeline, prompts, steps, guidance_scale, seed, sampler, **options)
            for image in batch]


def draw(pipeline, prompts, steps=30, guidance_scale=None, seed=2024, sampler="heun", *, negative_prompts=None,
         sigma_max=80.0, batch_size=16, progress=False, on_step=None):
    """Yield lists of pictures in the order of the prompts, each as soon as it is drawn; see generate.

    on_step(D (B,C,h,w)) is called at each sampler step with the denoised latents of the batch.
    """
    prompts, negative, seeds = check_prompts(prompts, negative_prompts, seed)
    p, guidance = pipeline, pipeline.guidance_scale if guidance_scale is None else guidance_scale
    group = max(batch_size, GROUP // batch_size * batch_size) if p.offload else batch_size
    with tqdm(total=len(prompts) * steps, unit=" picture steps", disable=not progress) as bar:
        def stepped(denoised):
            bar.update(len(denoised))
            if on_step:
                on_step(denoised)

        for start in range(0, len(prompts), group):
            ids = range(len(prompts))[start:start + group]
            batches = [ids[i:i + batch_size] for i in range(0, len(ids), batch_size)]
            with p.at_work(p.text_encoder):
                captions = [p.text_encoder([prompts[i] for i in b]) for b in batches]
                against = [p.text_encoder([negative[i] for i in b]) if negative else None for b in batches]
            with p.at_work(p.net), p.autocast():
                latents = [draw_latents(p.net, start_noise(p, [seeds[i] for i in b]), caption, steps, guidance, sampler,
                                        sigma_max=sigma_max, negative_caption=other, on_step=stepped)
                           for b, caption, other in zip(batches, captions, against)]
            with p.at_work(p.vae):
                images = [image for z in latents for image in decode_images(p.vae, z)]
            yield images


def start_noise(pipeline, seeds):
    """Return noise (B,C,h,w) ~ N(0, 1), every picture's a function of its seed alone."""
    c = pipeline.net.config
    shape = (c.latent_channels, c.latent_size, c.latent_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(noise).to(pipeline.device)
