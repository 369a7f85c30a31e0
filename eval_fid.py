"""
Pictures -> FID, CLIP-FID and CLIP score. A network of the drawn set is scored by a reader, without any download.

    python eval_fid.py                                                       # the newest run, if it is of the drawn set
    python eval_fid.py --checkpoint runs/NAME --captions captions_val2014.json --reference val2014 --count 30000
    torchrun --nproc_per_node=8 eval_fid.py ... --guidance_scales 1.5 2 3 5  # a curve, and the work on eight GPUs
    python eval_fid.py --images pictures --captions prompts.txt --reference val2014.npz

It draws the pictures (or takes those in --images), compares their features with a reference, a folder of real pictures
or an .npz of their statistics in pytorch-fid's format, and writes OUT/results.json: "results" has an entry for each
set of pictures, "protocol" all else that the numbers depend on. Started again, it uses the pictures that are there.

An entry of the drawn set has "attributes": {name: [right, of]}, and the same for drawn pictures ("attributes_drawn")
and for drawn pictures of other prompts ("attributes_chance"). There are two entries, for the pairs of colour and shape
that training showed and for unseen ones. This is the first alone, and faster:

    python eval_fid.py --checkpoint runs/tiny --captions shapes --count 128 --sampler dpmpp_2m --steps 20 --out scores
"""
from common.machine import exit_with_launcher
from configurator import configure

# what is judged
checkpoint = ""               # checkpoint file or run folder; empty: the newest run
images = ""                   # or a folder of pictures already made
captions = ""                 # prompts: .txt, one a line; COCO's .json or another list (.json, .jsonl, .tsv, .csv), the
                              # first caption of each picture; shapes or shapes_unseen: the drawn set's, with pairs of
                              # colour and shape that were shown in training or not. Empty: both of these, if trained
                              # on it, or with images their own
count = 0                     # prompts, drawn by caption_seed; 0: all (of the drawn set 256) (>= 0)
caption_seed = 0              # which prompts, where there are more than count (>= 0)
# what it is compared with
reference = ""                # folder of real pictures, or .npz of their statistics, with FILE.clip.npz for CLIP-FID
matched = False               # of the reference folder only the pictures whose captions are the prompts
save_reference = ""           # write the reference's statistics to this FILE.npz, and FILE.clip.npz
# how
metrics = ()                  # of fid, clip_fid, clip_score, attributes; empty: the first three, for shapes the last
resolution = 0                # side at which pictures are compared: shorter side resized, then the centre; 0: that of
                              # the judged pictures (>= 0)
resize = "clean"              # from there to Inception's 299: clean (clean-fid), tensorflow (the first FID code) or
                              # pytorch (pytorch-fid) (clean | tensorflow | pytorch)
inception = ""                # file of FID's Inception weights; empty: the published one, downloaded once (96 MB);
                              # random: fixed random ones, whose distances only compare runs with each other
clip = "openai/clip-vit-base-patch16"      # of the CLIP score; a hub id or folder
clip_fid = "openai/clip-vit-base-patch32"  # of CLIP-FID (clean-fid's)
# drawing, as in sample.py
guidance_scales = (-1.0,)     # one or more, each judged by itself; -1: as the run does
steps = 30                    # sampler steps (>= 1)
sampler = "heun"              # (heun | dpmpp_2m)
sigma_max = 80.0              # noise level at which sampling starts (> 0.002)
seed = 2024                   # picture i starts from noise that depends on seed + i alone (>= 0)
ema = True                    # use the averaged weights, where the run has them
vae = ""                      # autoencoder; empty: the one that the checkpoint was trained with
scaling_factor = 0.0          # of a --vae whose files do not name it; 0: they do (>= 0)
text_encoder = ""             # text encoder; empty: likewise
dtype = "auto"                # of all networks; auto: bfloat16 on cuda (auto | bfloat16 | float32)
offload = "auto"              # keep on the GPU only what is at work; auto: on GPUs below 16 GB (auto | yes | no)
compile = False               # torch.compile: a minute at the start, faster pictures on a GPU
batch_size = 32               # pictures drawn at once, and shown to Inception and CLIP at once (>= 1)
out = "scores"                # folder of the pictures, results.json and the plot
device = "auto"               # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import transformers

from common.files import write_json
from common.images import MOST, picture_grid
from common.machine import pick_device
from common.plot import plot
from evaluation import drawn, features, frechet, prompts
from evaluation import inception as inception_network
from evaluation.clip import Clip
from evaluation.processes import gathered, join, processes, run_script
from pictures import shapes
from pictures.decode import load
from pictures.sources import pictures_below
from sampling.pipeline import load as load_pipeline
from training import checkpoint as checkpoints

METRICS = {"fid": "distance of Inception's features", "clip_fid": "distance of CLIP's features",
           "clip_score": "mean of max(0, 100 x cosine)", "attributes": "[right, of] by the drawn set's reader"}
DISTANCES = ("fid", "clip_fid")
COLUMNS = ("attributes", "attributes_drawn", "attributes_chance")
READING = ("upright as EXIF says, white behind what is transparent, 16 bits to 8; the shorter side resized (bicubic, "
           "Pillow) to the resolution, then the centre")  # said in the results
FEW = 10_000  # pictures below which a distance says little


@dataclass
class Pictures:
    """A folder of pictures, and what is known of them"""
    name: str                # of the folder, below `out` if they are drawn here
    items: list              # [(path, caption, or None where no metric needs it)]
    side: int                # of the pictures, in pixels
    source: str              # where the captions are from
    prompts: list            # prompts.Prompt of each picture, where the source has an order
    description: dict        # of how they were drawn: generated.json


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def caption_sources(run):
    """Return --captions, or both kinds of the drawn set for a run that was trained on it."""
    if captions or images:
        return (captions,)
    data = checkpoints.read(run, ("no tensors",))[0]["data"] if run.suffix == ".safetensors" else {}
    sets = data.get("settings", {})
    if any(s.get("source") != "shapes" for s in (sets if isinstance(sets, list) else [sets])):
        raise ValueError(f"{run} is not of the drawn set: name prompts with --captions")
    return tuple(prompts.DRAWN)


def check_settings(chosen, distances, sources):
    """Refuse settings that do not fit together, before anything is loaded."""
    if unknown := [metric for metric in chosen if metric not in METRICS]:
        raise ValueError(f"metrics: '{unknown[0]}' is none of {', '.join(METRICS)}")
    scales = {f"{s:g}" for s in guidance_scales if s >= 0 or s == -1}
    is_folder = bool(reference) and Path(reference).is_dir()
    is_file = reference.endswith(".npz") and Path(reference).is_file()
    for refused, message in (
            ("attributes" in chosen and not set(sources) <= set(prompts.DRAWN),
             "the metric attributes is of the drawn set: --captions shapes"),
            (not scales or len(scales) < len(guidance_scales),
             f"guidance_scales {guidance_scales}: at least one, all different, from 0 on, or -1 for the run's own"),
            (images and (checkpoint or tuple(guidance_scales) != (-1.0,) or (count and not matched)),
             "checkpoint, guidance_scales and count are of pictures to be drawn: leave them out with --images"),
            (distances and not is_folder and not is_file,
             f"{' and '.join(distances)} need a --reference, a folder of real pictures or an .npz of their statistics, "
             f"which '{reference}' is not. Without one: --metrics clip_score"),
            ((matched or save_reference) and not (distances and is_folder),
             "matched and save_reference are about a --reference folder of pictures, for fid and clip_fid"),
            (save_reference and not save_reference.endswith(".npz"),
             f"save_reference {save_reference}: its name must end with .npz"),
            (matched and (not captions or prompts.in_order(captions)),
             "matched needs --captions that name their pictures, as COCO's do"),
            (captions and captions not in prompts.DRAWN and not Path(captions).is_file(),
             f"no captions file {captions}: give a .txt with a prompt a line, a list, or shapes or shapes_unseen"),
            (distances and count == 1, "count is 1: a distance needs two pictures, and thousands to mean much")):
        if refused:
            raise ValueError(message)


def existing_pictures(chosen):
    """Return the Pictures in --images."""
    paths, description = prompts.pictures_of(images), drawn.read_description(images)
    if len(paths) != description.get("pictures", len(paths)):
        raise ValueError(f"{images} holds {len(paths):,} pictures, {description['pictures']:,} were to be drawn: run "
                         "the command that drew them again")
    wanted = prompts.read(captions, len(paths)) if prompts.in_order(captions) else []
    texts = prompts.captions_for(images, paths, captions, wanted) if "clip_score" in chosen else [None] * len(paths)
    return Pictures(images, list(zip(paths, texts)), features.side_of(paths[0]), captions, wanted, description)


def folders_to_draw(pipeline, prompt_lists):
    """Return the Pictures of each kind of prompts at each guidance scale. Refuse a folder that holds others."""
    sets = []
    for source, wanted in prompt_lists.items():
        jobs = jobs_of(wanted)
        common = drawn.describe(pipeline, jobs, steps=steps, sampler=sampler, sigma_max=sigma_max, seed=seed,
                                batch_size=batch_size)
        for scale in dict.fromkeys(s if s >= 0 else pipeline.guidance_scale for s in guidance_scales):
            name = f"{source}/guidance_{scale:g}" if source in prompts.DRAWN else f"guidance_{scale:g}"
            description = common | {"guidance_scale": scale}
            drawn.open_folder(Path(out) / name, description)
            items = [(Path(out) / name / picture, caption) for picture, caption, _ in jobs]
            sets.append(Pictures(name, items, pipeline.size, source, wanted, description))
    return sets


def jobs_of(wanted):
    """Return [(name, prompt, seed)] of the pictures to draw."""
    return [(f"{i:05d}.png", prompt.caption, seed + i) for i, prompt in enumerate(wanted)]


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_pictures(wanted):
    """Return the paths of the reference folder's pictures; with `matched` those of the prompts alone."""
    folder = Path(reference)
    paths = sorted(pictures_below(folder))
    if matched:
        named = {}  # by the path in the folder, and by the name alone
        for path in paths:
            for name in {path.relative_to(folder).as_posix(), path.name}:
                named.setdefault(name, []).append(path)
        candidates = {p.picture: named.get(p.picture) or named.get(Path(p.picture).name, []) for p in wanted}
        if wrong := [f"'{name}' ({len(found)} times)" for name, found in candidates.items() if len(found) != 1]:
            raise ValueError(f"matched: {len(wrong):,} of the pictures that {captions} names are not once in {folder}: "
                             f"{', '.join(wrong[:10])}")
        paths = [path for path, in candidates.values()]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} pictures in {folder}: a reference needs two, and thousands to mean much")
    return paths


def statistics_file(path, metric):
    """Return the file of a metric's statistics, NAME.npz or NAME.clip.npz."""
    return Path(path) if metric == "fid" else Path(path).with_suffix(".clip.npz")


def read_statistics(network, metric, side):
    """Return (mu, sigma, what the results say of them) from the reference's .npz. Refuse what cannot be compared."""
    path = statistics_file(reference, metric)
    if not path.is_file():
        raise ValueError(f"{metric} needs the reference's CLIP statistics, {path}: make both with --reference FOLDER "
                         f"--save_reference {reference}, or choose --metrics without {metric}")
    mu, sigma, about = frechet.load(path)
    now, said = network.about | {"resolution": side, "features": network.width}, about | {"features": len(mu)}
    if differ := drawn.differences({key: said.get(key, value) for key, value in now.items()}, now):
        raise ValueError(f"{path} was made otherwise ({differ}): use the same settings, or make it again")
    return mu, sigma, {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "about": about}


def measure_reference(networks, paths, side):
    """Return ({metric: (mu, sigma, ...)}, what the results say of the reference)."""
    networks = {metric: network for metric, network in networks.items() if metric in DISTANCES}
    if not paths:
        statistics = {metric: read_statistics(network, metric, side) for metric, network in networks.items()}
        return statistics, {metric: about for metric, (_, _, about) in statistics.items()}
    sums = features.measure(networks, [(path, None) for path in paths], side, 0, batch_size, f"reference {reference}")
    about = {"source": reference, "pictures": sums.count, "matched": matched,
             "pictures_sha256": sums.sha256.hexdigest()}
    if save_reference and processes()[0] == 0:
        for metric, s in sums.statistics.items():
            frechet.save(statistics_file(save_reference, metric), s.mu, s.sigma, **networks[metric].about,
                         resolution=side, **about)
    return {metric: (s.mu, s.sigma) for metric, s in sums.statistics.items()}, about


# ---------------------------------------------------------------------------------------------------------------------
# The work


def load_networks(chosen, torch_device):
    """Return the networks that the metrics need."""
    networks = {"fid": inception_network.load(inception, torch_device, resize)} if "fid" in chosen else {}
    for metric, name in (("clip_fid", clip_fid), ("clip_score", clip)):
        if metric in chosen:
            networks[metric] = Clip(name, torch_device)
    return networks


def judge(networks, pictures, statistics, side):
    """Return an entry of the results."""
    sums = features.measure(networks, pictures.items, side, pictures.side, batch_size, pictures.name)
    entry = {"folder": pictures.name, "guidance_scale": pictures.description.get("guidance_scale"),
             "pictures": sums.count, "pictures_sha256": sums.sha256.hexdigest(),
             "captions": pictures.source or "the folder's own",
             "captions_sha256": drawn.hash_of([caption for _, caption in pictures.items])}
    for metric, s in sums.statistics.items():
        value = s.mu[0] if metric == "clip_score" else frechet.distance(s.mu, s.sigma, *statistics[metric][:2])
        entry[metric] = round(float(value), 4)
    return entry | {"generated": pictures.description}


def attribute_scores(pictures):
    """Return the scores of pictures of the drawn set, of drawn ones, and of drawn ones of other prompts (chance)."""
    images = [load(path.read_bytes(), 1) for path, _ in pictures.items]
    scenes = [shapes.scene(prompts.FIRST_SCENE + i, prompts.DRAWN[pictures.source], pictures.side)[0]
              for i in range(len(images))]
    columns = dict(zip(COLUMNS, (images, scenes, scenes[1:] + scenes[:1])))
    wanted = [prompt.attributes for prompt in pictures.prompts]
    grid = picture_grid(images[:MOST], 8, [prompt.caption for prompt in pictures.prompts[:MOST]])
    grid.save(Path(out) / f"{pictures.source}_{Path(pictures.name).name}.png")
    return {column: {name: list(n) for name, n in shapes.score(shown, wanted).items()}
            for column, shown in columns.items()}


def write_results(entries, protocol):
    """Write results.json, and with several guidance scales the plot, and print a table."""
    software = {"torch": torch.__version__.partition("+")[0], "pillow": PIL.__version__,
                "transformers": transformers.__version__}
    path = Path(out) / "results.json"
    write_json(path, {"results": entries, "protocol": protocol, "software": software})
    for entry in entries:
        print_entry(entry, protocol["resolution"], (protocol["reference"] or {}).get("pictures", 0))
    if not protocol["networks"].get("fid", {"published": True})["published"]:
        print(f"note: {inception} is not the published Inception: this FID compares with no other")
    draw_curve(entries)
    print(f"all of it: {path}")


def print_entry(entry, side, reference_size):
    """Print the numbers of a folder; reference_size is 0 where it is not known."""
    print(f"{entry['folder']}: {entry['pictures']:,} pictures at {side} px")
    for metric, how in (("fid", f"resize {resize}"), ("clip_fid", clip_fid), ("clip_score", clip)):
        if metric in entry:
            print(f"  {metric:12} {entry[metric]:9.4f}   ({how})")
    for name, (right, of) in entry.get("attributes", {}).items():
        percents = [f"{100 * entry[column][name][0] / of:5.1f} %" if of else "   none" for column in COLUMNS]
        print(f"  {name:12} {percents[0]}  ({right} of {of};  drawn {percents[1]}, chance {percents[2]})")
    few = {"judged": entry["pictures"], "reference": (reference_size or FEW)}
    if {"fid", "clip_fid"} & entry.keys() and min(few.values()) < FEW:
        which = " and ".join(f"{n:,} {name}" for name, n in few.items() if n < FEW)
        print(f"  note: distances of fewer than {FEW:,} pictures ({which}) come out too high: compare with as many")


def draw_curve(entries):
    """Plot FID against CLIP score, where there are both at several guidance scales."""
    points = {e["guidance_scale"]: (e["fid"], e["clip_score"]) for e in entries if "fid" in e and "clip_score" in e}
    if len(points) > 1 and len(points) == len(entries):
        path, scales = Path(out) / "fid_clip.png", sorted(points)
        plot(path, {"guidance scale": [points[s] for s in scales]},
             f"FID ({resize}, {entries[0]['pictures']:,} pictures)", f"CLIP score ({clip})",
             labels={"guidance scale": [f"{s:g}" for s in scales]})
        print(f"plot: {path}")


def main():
    run = None if images else checkpoints.find(checkpoint)
    sources = caption_sources(run)
    chosen = tuple(metrics) or (("attributes",) if sources[0] in prompts.DRAWN else tuple(METRICS)[:3])
    distances = [metric for metric in DISTANCES if metric in chosen]
    check_settings(chosen, distances, sources)
    prompt_lists = {source: prompts.choose(prompts.read(source, count), count, caption_seed, source)
                    for source in sources if run or matched}
    sets = [existing_pictures(chosen)] if images else []
    real = reference_pictures(prompt_lists.get(captions)) if distances and Path(reference).is_dir() else []
    for folder in (Path(out), Path(save_reference).parent):
        folder.mkdir(parents=True, exist_ok=True)
    rank, _ = join()
    torch_device = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    networks = load_networks(chosen, torch_device)
    if run:
        pipeline = load_pipeline(run, torch_device, ema=ema, vae=vae, text_encoder=text_encoder, dtype=dtype,
                                 offload=offload, compile=compile, scaling_factor=scaling_factor)
        sets = folders_to_draw(pipeline, prompt_lists)
    side = resolution or sets[0].side
    if side > sets[0].side:
        raise ValueError(f"resolution is {side}, and the pictures have {sets[0].side} px: they would be judged for the "
                         f"enlarging. Give at most {sets[0].side}")
    # the reference comes before the drawing, as it may be at fault
    statistics, about_reference = measure_reference(networks, real, side) if distances else ({}, None)
    for pictures in sets if run else ():
        drawn.fill(pipeline, Path(out) / pictures.name, jobs_of(pictures.prompts), batch_size, steps=steps,
                   sampler=sampler, guidance_scale=pictures.description["guidance_scale"], sigma_max=sigma_max)
    gathered("drawn")  # every process measures pictures that others drew
    entries = [judge(networks, pictures, statistics, side) for pictures in sets]
    if rank == 0:
        if "attributes" in chosen:
            entries = [entry | attribute_scores(pictures) for entry, pictures in zip(entries, sets)]
        write_results(entries, {
            "metrics": METRICS, "networks": {m: {"name": n.name, **n.about} for m, n in networks.items()},
            "resolution": side, "device": torch_device.type, "checkpoint": pipeline.name if run else None,
            "caption_seed": caption_seed, "reference": about_reference, "pictures": READING})
    gathered("written")


if __name__ == "__main__":
    run_script("eval_fid.py", main)
