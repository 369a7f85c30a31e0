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
from configurator import configure
from machine import exit_with_launcher

# what is judged
checkpoint = ""               # checkpoint file or run folder; empty: the newest run
images = ()                   # or folders of pictures already made, each judged by itself
captions = ""                 # prompts: .txt, one a line; COCO's .json or another list (.json, .jsonl, .tsv, .csv), the
                              # first caption of each picture; shapes or shapes_unseen: the drawn set's, with pairs of
                              # colour and shape that were shown in training or not. Empty: shapes, if trained on it
count = 0                     # prompts, drawn by caption_seed; 0: all (of the drawn set 256)
caption_seed = 0              # which prompts, where there are more than count
# what it is compared with
reference = ""                # folder of real pictures, .npz of their statistics (with FILE.clip.npz beside it for
                              # CLIP-FID), or shapes: the drawn pictures of the prompts
matched = False               # of the reference folder only the pictures whose captions are the prompts
save_reference = ""           # write the reference's statistics to this .npz, and FILE.clip.npz
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
out = "evaluation"            # folder of the pictures, results.json and the plot
device = "auto"               # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json
import random
from datetime import timedelta
from pathlib import Path

import PIL
import torch
import torch.distributed as dist
from PIL import Image

import captions as caption_files
import checkpoint as checkpoints
import features
import frechet
import generated
import inception as inception_network
import sample
import shapes
from clip import Clip
from dataset import write_atomic
from machine import pick_device, shared_store
from plot import plot
from sources import pictures_below

METRICS = ("fid", "clip_fid", "clip_score", "attributes")
DRAWN = {"shapes": False, "shapes_unseen": True}  # captions of the drawn set: held out pairs?
FIRST_SCENE = 10_000_000  # of the drawn set, as in eval_shapes.py: no training set uses these
FEW = 10_000  # pictures below which a distance says little


# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


def check_settings():
    """The metrics; ValueError where settings do not fit together"""
    drawn = captions in DRAWN
    chosen = tuple(metrics) or (("attributes",) if drawn else METRICS[:3])
    for name, value, options in [("metrics", m, METRICS) for m in chosen] + [
            ("resize", resize, tuple(inception_network.RESIZES)), ("sampler", sampler, ("heun", "dpmpp_2m"))]:
        if value not in options:
            raise ValueError(f"{name}: '{value}' is none of {', '.join(options)}")
    if count < 0 or resolution < 0 or batch_size < 1 or steps < 1:
        raise ValueError(f"count {count}, resolution {resolution}, batch_size {batch_size}, steps {steps}: the first "
                         "two must be at least 0, the others at least 1")
    if not guidance_scales:
        raise ValueError("guidance_scales is empty: give one or more, -1 for the run's own")
    if "attributes" in chosen and not drawn:
        raise ValueError("the metric attributes is of the drawn set: --captions shapes")
    distances = [m for m in chosen if m in ("fid", "clip_fid")]
    if distances and not reference:
        raise ValueError(f"{' and '.join(distances)} need a --reference: a folder of real pictures or an .npz of their "
                         "statistics. Without one: --metrics clip_score")
    if distances and reference != "shapes" and not Path(reference).is_dir() and not (
            reference.endswith(".npz") and Path(reference).is_file()):
        raise ValueError(f"no reference {reference}: it must be a folder of pictures or an .npz of statistics")
    if reference == "shapes" and not drawn:
        raise ValueError("--reference shapes is the drawn pictures of --captions shapes")
    if (matched or save_reference) and (not reference or reference.endswith(".npz") or reference == "shapes"):
        raise ValueError("matched and save_reference are about a --reference folder of pictures")
    if matched and (drawn or captions.endswith(".txt") or not captions):
        raise ValueError("matched needs --captions that name their pictures, as COCO's do")
    return chosen


def read_prompts(path, size):
    """[(name of the caption's picture or None, caption, attributes or None)] of all prompts, in order; and the names of
    the pictures that have no caption
    """
    if path in DRAWN:
        scenes = [shapes.scene(FIRST_SCENE + i, DRAWN[path], size) for i in range(count or 256)]
        return [(None, caption, attributes) for _, caption, attributes in scenes], []
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no captions file {path}: give a .txt with a prompt a line, or a list "
                         f"({', '.join(caption_files.TABLES)})")
    if file.suffix.lower() == ".txt":
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [(None, line.strip(), None) for line in lines if line.strip()]
    elif file.suffix.lower() in caption_files.TABLES:
        try:
            records = caption_files.records(file.name, file.read_bytes())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"captions file {path} cannot be read ({type(error).__name__}: {error})") from None
        found = [(names[0] if names else None, caption, None) for names, caption in records]
    else:
        raise ValueError(f"captions file {path}: it must be .txt or {', '.join(caption_files.TABLES)}")
    without = [str(name) for name, caption, _ in found if not caption]
    found = [entry for entry in found if entry[1]]
    if not found:
        raise ValueError(f"captions file {path} holds no captions")
    return found, without


def choose(entries):
    """`count` of them, drawn by caption_seed, in their order"""
    if not count or len(entries) == count:
        return entries
    if len(entries) < count:
        raise ValueError(f"{captions} has {len(entries):,} captions, and count is {count:,}")
    rng = random.Random(caption_seed)
    ranks = [rng.random() for _ in entries]  # the one method whose sequence Python promises to keep
    return [entries[i] for i in sorted(sorted(range(len(entries)), key=ranks.__getitem__)[:count])]


def captions_of(folder, wanted, entries):
    """[(path, caption or None)] of the pictures in a folder, ValueError if one that should be there is not.

    Captions: the captions file (those of .txt and of the drawn set, `entries`, in the order of the pictures' names),
    else what eval_fid.py wrote, else the prompt in the PNG, else NAME.txt beside it.
    """
    listed, folder = Path(folder) / generated.CAPTIONS, Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of pictures {folder}")
    paths = sorted(pictures_below(folder))
    if listed.exists():
        names = {p.relative_to(folder).as_posix(): p for p in paths}
        lines = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
        missing = [line["image"] for line in lines if line["image"] not in names]
        if missing:
            raise ValueError(f"{len(missing):,} pictures of {listed} are not there: {', '.join(missing[:10])}")
        paths = [names[line["image"]] for line in lines]
    if not paths:
        raise ValueError(f"no pictures in {folder}")
    in_order = captions in DRAWN or captions.endswith(".txt")
    if in_order and len(entries) != len(paths):
        raise ValueError(f"{captions} has {len(entries):,} prompts, {folder} {len(paths):,} pictures: prompt i must "
                         "belong to the i-th picture in the order of their names")
    if "clip_score" not in wanted:
        return [(path, None) for path in paths]
    if in_order:
        texts = [caption for _, caption, _ in entries]
    elif captions:
        look_up = caption_files.read_captions(captions)
        texts = [look_up(path.relative_to(folder).as_posix()) for path in paths]
    elif listed.exists():
        texts = [line["caption"] for line in lines]
    else:
        texts = [own_caption(path) for path in paths]
    without = [str(path) for path, text in zip(paths, texts) if not text]
    if without:
        raise ValueError(f"{len(without):,} of {len(paths):,} pictures have no caption, which the CLIP score needs: "
                         f"{', '.join(without[:10])}. Name a file with --captions, or choose --metrics fid clip_fid")
    return list(zip(paths, texts))


def own_caption(path):
    """The prompt that sample.py wrote into a PNG, or the text beside a picture, or None"""
    try:
        with Image.open(path) as image:
            if prompt := getattr(image, "text", {}).get("prompt"):
                return prompt
    except Exception:
        return None  # what is wrong with the picture is said when it is measured
    return caption_files.text_of(path.parent, path.name)


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def reference_pictures(names):
    """Paths of the reference folder's pictures, with `matched` those of the prompts alone"""
    folder = Path(reference)
    paths = sorted(pictures_below(folder))
    if matched:
        by_name = {path.relative_to(folder).as_posix(): path for path in paths}
        by_name |= {path.name: path for path in paths}
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ValueError(f"{len(missing):,} pictures of {captions} are not in {folder}: {', '.join(missing[:10])}")
        paths = [by_name[name] for name in names]
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} pictures in {folder}: a reference needs two, and thousands to mean much")
    return paths


def clip_file(path):
    return str(Path(path).with_suffix(".clip.npz"))


def read_statistics(networks, wanted, side):
    """({metric: (mu, sigma)}, what they say of themselves) of the reference's files"""
    found, said = {}, {}
    for metric, path in (("fid", reference), ("clip_fid", clip_file(reference))):
        if metric in wanted:
            if metric == "clip_fid" and not Path(path).is_file():
                raise ValueError(f"clip_fid needs the reference's CLIP statistics, {path}: make both with --reference "
                                 f"FOLDER --save_reference {reference}, or choose --metrics without clip_fid")
            mu, sigma, about = frechet.load(path)
            now = about_reference(networks, metric, side)
            differ = [f"{k}: {about[k]} there, {v} now" for k, v in now.items() if k in about and about[k] != v]
            if differ:
                raise ValueError(f"{path} was made otherwise ({'; '.join(differ)}): use the same settings, or make it "
                                 "again")
            found[metric], said[metric] = (mu, sigma), about
            if not about:
                print(f"note: {path} does not say how it was made: whether {now} fits it is yours to know")
    return found, said


def about_reference(networks, metric, side):
    """What a reference's statistics depend on, beside its pictures"""
    if metric == "clip_fid":
        return {"network_sha256": networks.clip_fid.sha256(), "resolution": side}
    return {"network_sha256": networks.inception.sha256, "resize": resize, "resolution": side}


def hash_of_files(paths):
    """Of names and sizes, which is enough to notice another set"""
    return hashlib.sha256("\n".join(f"{p.name} {p.stat().st_size}" for p in paths).encode()).hexdigest()


def measure_reference(networks, wanted, entries, scenes, side):
    """({metric: (mu, sigma)}, what is said of the reference); the statistics only in the first process"""
    if not any(m in wanted for m in ("fid", "clip_fid")):
        return {}, None
    if reference.endswith(".npz"):
        found, said = read_statistics(networks, wanted, side)
        return found, {"statistics": reference, "about": said}
    paths = scenes if reference == "shapes" else reference_pictures([name for name, *_ in entries])
    without_score = features.Networks(networks.inception, resize, networks.clip_fid, None, networks.device)
    sums = features.measure(without_score, [(path, None) for path in paths], side, False, batch_size,
                            f"reference {reference}")
    if sums is None:
        return {}, None
    found = {name: (s.mu, s.sigma) for name, s in sums.statistics.items()}
    said = {"source": reference, "pictures": sums.count, "smaller_than_resolution": sums.smaller, "matched": matched,
            "files_sha256": hash_of_files(paths)}
    if save_reference:
        for metric, path in (("fid", save_reference), ("clip_fid", clip_file(save_reference))):
            if metric in found:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                frechet.save(path, *found[metric], **about_reference(networks, metric, side), **said)
    return found, said


# ---------------------------------------------------------------------------------------------------------------------
# The work


def set_up():
    """(rank, number of processes, device)"""
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


def judged(networks, items, entries, wanted, reference_statistics, side, what):
    """{"pictures", metric: number} of pictures [(path, caption)]; None but in the first process"""
    sums = features.measure(networks, items, side, True, batch_size, what)
    if sums is None:
        return None
    found = {"pictures": sums.count}
    if "attributes" in wanted:
        found["attributes"] = attributes(items, entries)
    for metric in ("fid", "clip_fid"):
        if metric in wanted:
            ours = sums.statistics[metric]
            found[metric] = round(frechet.distance(ours.mu, ours.sigma, *reference_statistics[metric]), 4)
    if "clip_score" in wanted:
        found["clip_score"] = round(sums.clip_score / sums.count, 4)
    return found


def load_run(run, where):
    """(network, entries, side of its pictures, what is said)"""
    model = sample.load(run, where, ema, vae, text_encoder, dtype, offload, compile, scaling_factor)
    size = model.config.latent_size * model.vae.downsample
    if size < resolution:
        raise ValueError(f"{run} draws pictures of {size} x {size}, smaller than resolution {resolution}: enlarged "
                         f"they would be judged for the enlarging. Give a --resolution of at most {size}")
    entries, without = read_prompts(captions, size)
    entries = entries if captions in DRAWN else choose(entries)
    return model, entries, size, {"checkpoint": model.name, "captions": {
        "source": captions, "prompts": len(entries), "caption_seed": caption_seed, "pictures_without": len(without),
        "sha256": generated.hash_of([caption for _, caption, _ in entries])}}


def draw_all(model, entries, rank, world):
    """folders as in main, drawn by all processes"""
    jobs = [(f"{i:05d}.png", caption, seed + i) for i, (_, caption, _) in enumerate(entries)]
    how = {"steps": steps, "sampler": sampler, "sigma_max": sigma_max}
    folders = []
    for scale in guidance_scales:
        scale = scale if scale >= 0 else model.guidance_scale
        folder = Path(out) / f"guidance_{scale:g}"
        described = generated.describe(model, jobs, guidance_scale=scale, seed=seed, batch_size=batch_size, **how)
        generated.open_folder(folder, described, jobs)
        generated.fill(model, folder, jobs, rank, world, batch_size, guidance_scale=scale, **how)
        folders.append((scale, folder, [(folder / name, caption) for name, caption, _ in jobs], described))
    if world > 1:
        dist.barrier()  # every process measures pictures that others drew
    return folders


def drawn_reference(size, rank, world):
    """The drawn pictures of the prompts, as files"""
    folder, n = Path(out) / "reference", count or 256
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            image = shapes.scene(FIRST_SCENE + i, DRAWN[captions], size)[0]
            write_atomic(folder / f"{i:05d}.png", lambda file, image=image: image.save(file, "PNG"))
    if world > 1:
        dist.barrier()
    return [folder / f"{i:05d}.png" for i in range(n)]


def find_all(wanted):
    """(folders as in main, entries, what is said) of pictures already made"""
    entries = []
    if captions in DRAWN or captions.endswith(".txt"):
        entries = read_prompts(captions, side_of([next(iter(sorted(pictures_below(images[0]))), images[0])]))[0]
    elif matched:
        entries = choose(read_prompts(captions, 0)[0])
    said = {"captions": {"source": captions or "beside the pictures"}} if "clip_score" in wanted else {}
    folders = []
    for folder in images:
        described = Path(folder) / generated.DESCRIBED
        items = captions_of(folder, wanted, entries)
        folders.append((None, Path(folder), items, json.loads(described.read_text()) if described.exists() else None))
        said.setdefault("captions", {})[f"sha256 {folder}"] = generated.hash_of([caption for _, caption in items])
    return folders, entries, said


def side_of(paths):
    """`resolution`, or the side of the pictures, the first of each folder; ValueError if these differ"""
    sides = {features.size_of_first(path, resolution)[0] for path in paths}
    if resolution or len(sides) == 1:
        return resolution or sides.pop()
    raise ValueError(f"the folders' pictures have sides of {', '.join(map(str, sorted(sides)))}: give a --resolution")


def attributes(items, entries):
    """shapes.read's scores of the pictures, {name: [right, of]}"""
    pictures = [Image.open(path) for path, _ in items]
    return {name: list(n) for name, n in shapes.score(pictures, [wanted for *_, wanted in entries]).items()}


def main():
    global captions
    run = None if images else checkpoints.find(checkpoint)
    captions = captions or (captions_of_run(run) if run else "")
    wanted = check_settings()
    rank, world, where = set_up()
    networks = load_networks(wanted, where, rank, world)
    # folders: [(guidance scale or None, folder, [(path, caption or None)], its generated.json or None)]
    # entries: [(name of the caption's picture or None, caption, attributes or None)]
    if run:
        model, entries, side, said = load_run(run, where)
    else:
        folders, entries, said = find_all(wanted)
        side = side_of([items[0][0] for _, _, items, _ in folders])
    side = resolution or side
    # before anything is drawn, as it may be at fault
    scenes = drawn_reference(side, rank, world) if reference == "shapes" else []
    statistics, reference_said = measure_reference(networks, wanted, entries, scenes, side)
    if run:
        folders = draw_all(model, entries, rank, world)
        del model
    results = []
    for scale, folder, items, described in folders:
        found = judged(networks, items, entries, wanted, statistics, side, str(folder))
        if found:
            where_from = folder.name if run else str(folder)
            results.append({"folder": where_from, "guidance_scale": scale, **found, "generated": described})
    if rank == 0:
        protocol = {"metrics": list(wanted), "resolution": side, **said, "reference": reference_said}
        write_results(protocol | about_networks(networks), results)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def captions_of_run(run):
    """"shapes" for a network of the drawn set; ValueError for others, whose captions must be named"""
    source = ""
    if run.suffix == ".safetensors":
        source = checkpoints.read(run, ("none",))[0]["data"].get("settings", {}).get("source", "")
    if source != "shapes":
        raise ValueError(f"{run} is not of the drawn set: name prompts with --captions")
    return "shapes"


def write_results(protocol, results):
    """The JSON file, a table, and with several guidance scales the plot"""
    import transformers
    software = {"torch": torch.__version__.partition("+")[0], "pillow": PIL.__version__,
                "transformers": transformers.__version__}
    path = Path(out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"results": results, "protocol": protocol, "software": software}, indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))
    for r in results:
        print(f"{r['folder']}: {r['pictures']:,} pictures at {protocol['resolution']} px")
        for metric, how in (("fid", f"resize {resize}"), ("clip_fid", clip_fid), ("clip_score", clip)):
            if metric in r:
                print(f"  {metric:12} {r[metric]:9.4f}   ({how})")
        for name, (right, of) in r.get("attributes", {}).items():
            print(f"  {name:12} {100 * right / of if of else 0:8.1f} %  ({right} of {of})")
        if min(r["pictures"], FEW) < FEW and "fid" in r:
            print(f"  note: distances of fewer than {FEW:,} pictures come out too high: compare with as many alone")
    if not protocol.get("inception", {"published": True})["published"]:
        print(f"note: {inception} is not the published Inception: this FID compares with no other")
    points = [(r["fid"], r["clip_score"]) for r in results if "fid" in r and "clip_score" in r]
    if len(points) > 1 and len(points) == len(results):
        labels = [f"{r['guidance_scale']:g}" if r["guidance_scale"] is not None else r["folder"] for r in results]
        fid_label = f"FID ({resize}, {results[0]['pictures']:,} pictures)"
        plot(Path(out) / "fid_clip.png", {"guidance scale": points}, fid_label, f"CLIP score ({clip})",
             labels={"guidance scale": labels})
        print(f"plot: {Path(out) / 'fid_clip.png'}")
    print(f"all of it: {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_fid.py: {error}" if generated.processes()[0] == 0 else 1) from None
    except KeyboardInterrupt:
        raise SystemExit("eval_fid.py: stopped. The same command goes on with the pictures that are there") from None
