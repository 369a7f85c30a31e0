"""
Pictures -> FID, CLIP-FID, CLIP score; and for the drawn set what shapes.read sees, which needs no download.

    python eval_fid.py                                                       # the newest run, if it is of the drawn set
    python eval_fid.py --checkpoint runs/NAME --captions captions_val2014.json --reference val2014 --count 30000
    torchrun --nproc_per_node=8 eval_fid.py ... --guidance_scales 1.5 2 3 5  # a curve, and the work on eight GPUs
    python eval_fid.py --images pictures --captions prompts.txt --reference val2014.npz

All in one run: draws the pictures (or takes those in --images), compares their features with a reference, a folder of
real pictures or statistics of one in pytorch-fid's format, and writes OUT/results.json, which says all that the numbers
depend on. Stopped and started again, it uses the pictures that are there.
"""
from common.machine import exit_with_launcher
from configurator import configure

# what is judged
checkpoint = ""               # checkpoint file or run folder; empty: the newest run
images = ()                   # or folders of pictures already made, each judged by itself
captions = ""                 # prompts: .txt, one a line; COCO's .json or another list (.json, .jsonl, .tsv, .csv), the
                              # first caption of each picture; shapes or shapes_unseen: the drawn set's, with pairs of
                              # colour and shape that were shown in training or not. Empty: shapes, if trained on it,
                              # or with images their own
count = 0                     # prompts, drawn by caption_seed; 0: all (of the drawn set 256)
caption_seed = 0              # which prompts, where there are more than count
# what it is compared with
reference = ""                # folder of real pictures, .npz of their statistics (with FILE.clip.npz beside it for
                              # CLIP-FID), or shapes: the drawn pictures of the prompts
matched = False               # of the reference folder only the pictures whose captions are the prompts
save_reference = ""           # write the reference's statistics to this FILE.npz, and FILE.clip.npz
# how
metrics = ()                  # of fid, clip_fid, clip_score, attributes; empty: the first three, for shapes the last
resolution = 0                # side at which pictures are compared: shorter side resized, then the centre; 0: that of
                              # the judged pictures
resize = "clean"              # from there to Inception's 299: clean (clean-fid), tensorflow (the first FID code) or
                              # pytorch (pytorch-fid)
inception = ""                # file of FID's Inception weights; empty: the published one, downloaded once (96 MB)
clip = "openai/clip-vit-base-patch16"      # of the CLIP score; a hub id or folder
clip_fid = "openai/clip-vit-base-patch32"  # of CLIP-FID (clean-fid's)
# drawing, as in sample.py
guidance_scales = (-1.0,)     # one or more, each judged by itself; -1: as the run does
steps = 30                    # sampler steps
sampler = "heun"              # heun or dpmpp_2m
sigma_max = 80.0              # noise level at which sampling starts
seed = 2024                   # picture i starts from noise that depends on seed + i alone
ema = True                    # use the averaged weights, where the run has them
vae = ""                      # autoencoder; empty: the one that the checkpoint was trained with
scaling_factor = 0.0          # of a --vae whose files do not name it; 0: they do
text_encoder = ""             # text encoder; empty: likewise
dtype = "auto"                # of the network and its frozen ends: bfloat16 or float32; auto: bfloat16 on cuda
offload = "auto"              # keep on the GPU only what is at work: yes, no; auto: yes on GPUs below 16 GB
compile = False               # torch.compile: a minute at the start, faster pictures on a GPU
batch_size = 32               # pictures drawn at once, and shown to Inception and CLIP at once
out = "scores"                # folder of the pictures, results.json and the plot
device = "auto"               # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import PIL
import torch
import torch.distributed as dist

from common.files import write_atomic
from common.machine import pick_device, shared_store
from common.plot import plot
from evaluation import drawn as generated
from evaluation import features, frechet, prompts
from evaluation import inception as inception_network
from evaluation.clip import Clip
from pictures import shapes
from pictures.decode import load
from pictures.sources import pictures_below
from sampling.pipeline import load as load_pipeline
from training import checkpoint as checkpoints

METRICS = ("fid", "clip_fid", "clip_score", "attributes")
DISTANCES = ("fid", "clip_fid")
FEW = 10_000  # pictures below which a distance says little


@dataclass
class Judged:
    """A folder of pictures, and what is known of it"""
    folder: Path
    items: list                 # [(path, caption or None)]
    scale: float = None         # guidance
    described: dict = None      # its generated.json


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def check_settings():
    """The metrics; ValueError where settings do not fit together"""
    drawn = captions in prompts.DRAWN
    chosen = tuple(metrics) or (("attributes",) if drawn else METRICS[:3])
    for name, value, options in [("metrics", m, METRICS) for m in chosen] + [
            ("resize", resize, tuple(inception_network.RESIZES)), ("sampler", sampler, ("heun", "dpmpp_2m"))]:
        if value not in options:
            raise ValueError(f"{name}: '{value}' is none of {', '.join(options)}")
    if count < 0 or resolution < 0 or batch_size < 1 or steps < 1:
        raise ValueError(f"count {count}, resolution {resolution}, batch_size {batch_size}, steps {steps}: the first "
                         "two must be at least 0, the others at least 1")
    if "attributes" in chosen and not drawn:
        raise ValueError("the metric attributes is of the drawn set: --captions shapes")
    if not all(math.isfinite(s) and (s >= 0 or s == -1) for s in guidance_scales) or not guidance_scales or (
            len({f"{s:g}" for s in guidance_scales}) < len(guidance_scales)):
        raise ValueError(f"guidance_scales {guidance_scales}: at least one, all different, from 0 on, or -1 for the "
                         "run's own")
    if images and (checkpoint or tuple(guidance_scales) != (-1.0,) or (count and not (matched or drawn))):
        raise ValueError("checkpoint, guidance_scales and count are about pictures to be drawn, and images are there "
                         "already: leave them out")
    check_reference([m for m in chosen if m in DISTANCES], drawn)
    return chosen


def check_reference(distances, drawn):
    if distances and not reference:
        raise ValueError(f"{' and '.join(distances)} need a --reference: a folder of real pictures or an .npz of their "
                         "statistics. Without one: --metrics clip_score")
    statistics = reference.endswith(".npz") and Path(reference).is_file()
    if distances and reference != "shapes" and not Path(reference).is_dir() and not statistics:
        raise ValueError(f"no reference {reference}: it must be a folder of pictures or an .npz of statistics")
    if reference == "shapes" and not drawn:
        raise ValueError("--reference shapes is the drawn pictures of --captions shapes")
    if (matched or save_reference) and (not distances or reference == "shapes" or statistics):
        raise ValueError("matched and save_reference are about a --reference folder of pictures, for fid and clip_fid")
    if save_reference and not save_reference.endswith(".npz"):
        raise ValueError(f"save_reference {save_reference}: its name must end with .npz")
    if matched and (not captions or prompts.in_order(captions)):
        raise ValueError("matched needs --captions that name their pictures, as COCO's do")
    if count == 1 and distances:
        raise ValueError("count is 1: a distance needs at least two pictures, and thousands to mean much")


def captions_of_run(run):
    """"shapes" for a network of the drawn set; ValueError for others, whose captions must be named"""
    sets = []
    if run.suffix == ".safetensors":
        said = checkpoints.read(run, ("none",))[0]["data"].get("settings", {})
        sets = said if isinstance(said, list) else [said]
    if not sets or any(s.get("source") != "shapes" for s in sets):
        raise ValueError(f"{run} is not of the drawn set: name prompts with --captions")
    return "shapes"


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_pictures(found):
    """Paths of the reference folder's pictures, with `matched` those of the prompts alone"""
    folder = Path(reference)
    paths = sorted(pictures_below(folder))
    if matched:
        by_end = {}
        for path in paths:
            by_end.setdefault(path.name, []).append(path)
        exact = {path.relative_to(folder).as_posix(): [path] for path in paths}
        places = {p.picture: exact.get(p.picture) or by_end.get(Path(p.picture).name, []) for p in found}
        if "" in places:
            raise ValueError(f"matched: the captions of {captions} do not all name a picture")
        for problem, wrong in (("are not in", [name for name, there in places.items() if not there]),
                               ("are there several times in", [n for n, there in places.items() if len(there) > 1])):
            if wrong:
                raise ValueError(f"{len(wrong):,} pictures of {captions} {problem} {folder}: {', '.join(wrong[:10])}")
        paths = [place for place, in places.values()]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} pictures in {folder}: a reference needs two, and thousands to mean much")
    return paths


def clip_file(path):
    return str(Path(path).with_suffix(".clip.npz"))


def about_reference(networks, metric, side):
    """What a reference's statistics depend on, beside its pictures"""
    if metric == "clip_fid":
        return {"network_sha256": networks.clip_fid.sha256(), "resolution": side}
    return {"network_sha256": networks.inception.sha256, "resize": resize, "resolution": side}


def read_statistics(networks, metric, path, side):
    """(mu, sigma, what is said of them) of a reference's file; ValueError if it cannot be compared with"""
    if not Path(path).is_file():
        raise ValueError(f"{metric} needs the reference's CLIP statistics, {path}: make both with --reference FOLDER "
                         f"--save_reference {reference}, or choose --metrics without {metric}")
    mu, sigma, about = frechet.load(path)
    width = inception_network.WIDTH if metric == "fid" else networks.clip_fid.model.config.projection_dim
    if len(mu) != width:
        raise ValueError(f"{path} is of {len(mu)} features, {metric} has {width}: it is of another network")
    try:
        frechet.factor(sigma, "reference's")  # what is no covariance is better refused now than in the end
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    now = about_reference(networks, metric, side)
    differ = [f"{k}: {about[k]} there, {v} now" for k, v in now.items() if k in about and about[k] != v]
    if differ:
        raise ValueError(f"{path} was made otherwise ({'; '.join(differ)}): use the same settings, or make it again")
    if not about and generated.processes()[0] == 0:
        print(f"note: {path} does not say how it was made: whether {now} fits it is yours to know")
    return mu, sigma, {"file": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "about": about}


def measure_reference(networks, wanted, found, side, scenes):
    """({metric: (mu, sigma)}, what is said of the reference); the statistics only in the first process"""
    wanted = [m for m in DISTANCES if m in wanted]
    if not wanted:
        return {}, None
    if reference.endswith(".npz"):
        paths = {"fid": reference, "clip_fid": clip_file(reference)}
        files = {m: read_statistics(networks, m, paths[m], side) for m in wanted}
        return {m: (mu, sigma) for m, (mu, sigma, _) in files.items()}, {m: said for m, (*_, said) in files.items()}
    paths = scenes or reference_pictures(found)
    without_score = features.Networks(networks.inception, resize, networks.clip_fid, None, networks.device)
    sums = features.measure(without_score, [(path, None) for path in paths], side, False, batch_size,
                            f"reference {reference}")
    if sums is None:
        return {}, None
    if sums.smaller:
        print(f"note: {sums.smaller:,} of {sums.count:,} reference pictures were smaller than {side} px and enlarged")
    statistics = {name: (s.mu, s.sigma) for name, s in sums.statistics.items()}
    said = {"source": reference, "pictures": sums.count, "smaller_than_resolution": sums.smaller, "matched": matched,
            "pictures_sha256": sums.sha256.hexdigest()}
    for metric in wanted if save_reference else ():
        path = save_reference if metric == "fid" else clip_file(save_reference)
        frechet.save(path, *statistics[metric], **about_reference(networks, metric, side), **said)
    return statistics, said


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def load_run(run, where):
    """(network, prompts, what is said, side of its pictures)"""
    model = load_pipeline(run, where, ema=ema, vae=vae, text_encoder=text_encoder, dtype=dtype, offload=offload,
                          compile=compile, scaling_factor=scaling_factor)
    size = model.size
    if size < resolution:
        raise ValueError(f"{run} draws pictures of {size} x {size}, smaller than resolution {resolution}: enlarged "
                         f"they would be judged for the enlarging. Give a --resolution of at most {size}")
    found, without = prompts.read(captions, count, size)
    if captions not in prompts.DRAWN:
        found = prompts.choose(found, count, caption_seed, captions)
    return model, found, {"checkpoint": model.name, "captions": {
        "source": captions, "prompts": len(found), "caption_seed": caption_seed, "pictures_without": len(without),
        "sha256": generated.hash_of([prompt.caption for prompt in found])}}, size


def folders_to_draw(model, found):
    """([Judged] of the guidance scales, [(name, prompt, seed)] to draw in each). ValueError if one of the folders holds
    other pictures, before any is drawn.
    """
    jobs = [(f"{i:05d}.png", prompt.caption, seed + i) for i, prompt in enumerate(found)]
    common = generated.describe(model, jobs, steps=steps, sampler=sampler, sigma_max=sigma_max, seed=seed,
                                batch_size=batch_size)
    judged = []
    for scale in dict.fromkeys(s if s >= 0 else model.guidance_scale for s in guidance_scales):
        folder, described = Path(out) / f"guidance_{scale:g}", common | {"guidance_scale": scale}
        generated.open_folder(folder, described, jobs)
        judged.append(Judged(folder, [(folder / name, caption) for name, caption, _ in jobs], scale, described))
    return judged, jobs


def folders_there(wanted):
    """([Judged] of --images, prompts, what is said, side of their pictures)"""
    folders = {folder: prompts.pictures_of(folder) for folder in images}
    side, found = side_of([paths[0] for paths in folders.values()]), []
    if prompts.in_order(captions) or matched:
        size = len(next(iter(folders.values())))
        found = prompts.read(captions, size, side)[0]
        found = prompts.choose(found, count, caption_seed, captions) if matched else found
    judged, said = [], {}
    for folder, paths in folders.items():
        texts = [None] * len(paths)
        if "clip_score" in wanted:
            texts = prompts.captions_for(folder, paths, captions, found)
            said[folder] = {"source": captions or "the folder's own", "sha256": generated.hash_of(texts)}
        described = generated.read_described(folder)
        judged.append(Judged(Path(folder), list(zip(paths, texts)), (described or {}).get("guidance_scale"), described))
    if "attributes" in wanted and any(len(j.items) != len(found) for j in judged):
        raise ValueError("the folders have different numbers of pictures: judge them one by one")
    return judged, found, {"captions": said}, side


def side_of(paths):
    """`resolution`, or the side of the pictures, the first of each folder; ValueError if these differ"""
    sides = {features.size_of_first(path, resolution)[0] for path in paths}
    if resolution or len(sides) == 1:
        return resolution or sides.pop()
    raise ValueError(f"the folders' pictures have sides of {', '.join(map(str, sorted(sides)))}: give a --resolution")


def drawn_reference(n, side, rank, world):
    """The drawn pictures of the first n prompts, as files"""
    folder = Path(out) / "reference"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = shapes.scene(prompts.FIRST_SCENE + i, prompts.DRAWN[captions], side)[0]
            write_atomic(folder / f"{i:05d}.png", lambda file, image=image: image.save(file, "PNG"))
    if world > 1:
        dist.barrier()
    return [folder / f"{i:05d}.png" for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# The work


def set_up():
    """(rank, number of processes, device)"""
    for folder in [Path(out), *([Path(save_reference).parent] if save_reference else [])]:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, a folder is wanted")
        folder.mkdir(parents=True, exist_ok=True)
    rank, world = generated.processes()
    where = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if world > 1:  # over CPUs, as only little is said; a process may have to wait for the others' pictures for long
        dist.init_process_group("gloo", store=shared_store(), rank=rank, world_size=world, timeout=timedelta(days=2))
    return rank, world, where


def load_networks(wanted, where, rank, world):
    """Inception and CLIP, the first process first: it may have to download them"""
    if rank:
        dist.barrier()
    found = features.Networks(resize=resize, device=where)
    try:
        if "fid" in wanted:
            found.inception = inception_network.load(inception, where)
        if "clip_fid" in wanted:
            found.clip_fid = Clip(clip_fid, where)
        if "clip_score" in wanted:
            found.clip_score = found.clip_fid if "clip_fid" in wanted and clip == clip_fid else Clip(clip, where)
    finally:
        if world > 1 and not rank:
            dist.barrier()
    return found


def about_networks(networks):
    """What is said of them in the results"""
    said = {}
    if net := networks.inception:
        said["inception"] = {"sha256": net.sha256, "published": net.published, "resize": resize}
    for name in ("clip_fid", "clip_score"):
        if model := getattr(networks, name):
            said[f"{name}_model"] = {"name": model.name, "sha256": model.sha256()}
    return said


def judge(networks, judged, found, wanted, statistics, side):
    """An entry of the results; None but in the first process"""
    sums = features.measure(networks, judged.items, side, True, batch_size, str(judged.folder))
    if sums is None:
        return None
    result = {"guidance_scale": judged.scale, "pictures": sums.count, "pictures_sha256": sums.sha256.hexdigest()}
    for metric in DISTANCES:
        if metric in wanted:
            ours = sums.statistics[metric]
            result[metric] = round(frechet.distance(ours.mu, ours.sigma, *statistics[metric]), 4)
    if "clip_score" in wanted:
        result["clip_score"] = round(sums.clip_score / sums.count, 4)
    if "attributes" in wanted:
        drawn = (load(path.read_bytes(), 1) for path, _ in judged.items)
        scores = shapes.score(drawn, [prompt.attributes for prompt in found])
        result["attributes"] = {name: list(n) for name, n in scores.items()}
    return result | {"generated": judged.described}


def main():
    global captions
    run = None if images else checkpoints.find(checkpoint)
    captions = captions or (captions_of_run(run) if run else "")
    wanted = check_settings()
    rank, world, where = set_up()
    for folder in (*images, reference) if rank == 0 else ():
        prompts.note_others(folder)
    networks = load_networks(wanted, where, rank, world)
    if run:
        model, found, said, side = load_run(run, where)
        all_judged, jobs = folders_to_draw(model, found)
    else:
        all_judged, found, said, side = folders_there(wanted)
    side = resolution or side
    if set(wanted) & set(DISTANCES) and any(len(j.items) < 2 for j in all_judged):
        raise ValueError("a distance needs at least two pictures, and thousands to mean much")
    # the reference comes before the drawing, as it may be at fault
    scenes = drawn_reference(len(found), side, rank, world) if reference == "shapes" else []
    statistics, said["reference"] = measure_reference(networks, wanted, found, side, scenes)
    if run:
        for j in all_judged:
            generated.fill(model, j.folder, jobs, batch_size, guidance_scale=j.scale, steps=steps,
                           sampler=sampler, sigma_max=sigma_max)
        if world > 1:
            dist.barrier()  # every process measures pictures that others drew
        del model
    results = {}
    for j in all_judged:
        results[j.folder.name if run else str(j.folder)] = judge(networks, j, found, wanted, statistics, side)
    if rank == 0:
        protocol = {"metrics": list(wanted), "resolution": side, "device": where.type, **said}
        write_results(protocol | about_networks(networks), results)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def write_results(protocol, results):
    """results.json, a table, and with several guidance scales the plot. Another result that is there is kept."""
    import transformers
    software = {"torch": torch.__version__.partition("+")[0], "pillow": PIL.__version__,
                "transformers": transformers.__version__}
    entries = [{"folder": folder, **result} for folder, result in results.items()]
    text = json.dumps({"results": entries, "protocol": protocol, "software": software}, indent=1) + "\n"
    path = Path(out) / "results.json"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        n = next(n for n in range(1, 10 ** 6) if not path.with_name(f"results.{n}.json").exists())
        path.rename(path.with_name(f"results.{n}.json"))
        print(f"the results of an earlier evaluation are now in {path.with_name(f'results.{n}.json')}")
    write_atomic(path, lambda file: file.write(text.encode()))
    for entry in entries:
        print_entry(entry, protocol["resolution"])
    if not protocol.get("inception", {"published": True})["published"]:
        print(f"note: {inception} is not the published Inception: this FID compares with no other")
    draw_curve(entries)
    print(f"all of it: {path}")


def print_entry(entry, side):
    print(f"{entry['folder']}: {entry['pictures']:,} pictures at {side} px")
    for metric, how in (("fid", f"resize {resize}"), ("clip_fid", clip_fid), ("clip_score", clip)):
        if metric in entry:
            print(f"  {metric:12} {entry[metric]:9.4f}   ({how})")
    for name, (right, of) in entry.get("attributes", {}).items():
        print(f"  {name:12} {100 * right / of:8.1f} %  ({right} of {of})" if of else f"  {name:12}     none")
    if "fid" in entry and entry["pictures"] < FEW:
        print(f"  note: distances of fewer than {FEW:,} pictures come out too high: compare with as many alone")


def draw_curve(entries):
    """FID against CLIP score, where there are both at several guidance scales"""
    points = {e["guidance_scale"]: (e["fid"], e["clip_score"]) for e in entries if "fid" in e and "clip_score" in e}
    if len(points) > 1 and None not in points and len(points) == len(entries):
        path, scales = Path(out) / "fid_clip.png", sorted(points)
        fid_label = f"FID ({resize}, {entries[0]['pictures']:,} pictures)"
        plot(path, {"guidance scale": [points[s] for s in scales]}, fid_label, f"CLIP score ({clip})",
             labels={"guidance scale": [f"{s:g}" for s in scales]})
        print(f"plot: {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        # a ValueError is met by all processes alike, as settings and files are the same for them
        alike = isinstance(error, ValueError) and generated.processes()[0] > 0
        raise SystemExit(1 if alike else f"eval_fid.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("eval_fid.py: stopped. The same command goes on with the pictures that are there") from None
