"""
Pictures -> FID, CLIP-FID and CLIP score. For `shapes`, a program checks what was drawn, and nothing is downloaded. For
emoji, or another small set, it checks whether the picture that was meant is the nearest one to what was drawn.
OUT/results.json has the numbers and what they depend on. docs/evaluation.md explains them.

    python eval_fid.py                                    # the newest run, if it was trained on `shapes` or `emoji`
    python eval_fid.py --checkpoint runs/NAME --metrics nearest --reference photos/  # of a small set, by its captions
    python eval_fid.py --checkpoint runs/NAME --captions captions_val2014.json --reference val2014 --count 30000
    torchrun --nproc_per_node=8 eval_fid.py ... --guidance_scales 1.5 2 3 5  # a curve, and the work on eight GPUs
    python eval_fid.py --images pictures --captions prompts.txt --reference val2014.npz
"""
from common.machine import exit_with_launcher
from configurator import configure

# What stands in parentheses is checked.
checkpoint = ""            # checkpoint file or run folder; empty: the newest run
images = ""                # folder of pictures to judge instead
captions = ""              # prompts: a .txt with one in each line; a table of captions (.json, .jsonl, .tsv, .csv),
                           # COCO's too; shapes, shapes_unseen, emoji, emoji_unseen; empty: both of the run's set, or
                           # those inside --images
count = 0                  # number of prompts, chosen by chance; 0: all, but 256 of shapes and emoji (>= 0)
reference = ""             # folder of real pictures, or .npz of their statistics, such as an earlier OUT/reference.npz;
                           # for nearest: pictures with captions, as prepare_latents.py takes them; empty: emoji_all
matched = False            # compare only with the pictures of the reference whose captions are the prompts
metrics = ()               # empty: attributes for shapes, nearest for emoji, and else the first three
                           # (fid | clip_fid | clip_score | attributes | nearest)
resolution = 0             # side at which pictures are compared; 0: that of the judged pictures (>= 0)
resize = "clean"           # how pictures get to Inception's 299 px: as in clean-fid, or in the first FID code
                           # (clean | tensorflow)
inception = ""             # file of weights; empty: the published ones (96 MB); random: fixed ones, to compare runs
guidance_scales = (-1.0,)  # one or more guidance scales, each scored by itself; -1: that of the run (>= -1)
steps = 30                 # number of sampler steps (>= 1)
sampler = "heun"           # as in sample.py (heun | dpmpp_2m)
font = ""                  # file of the font that emoji are from; empty: that of the run, or this computer's
vae = ""                   # autoencoder, which nearest needs with --images, too; empty: that of the checkpoint
text_encoder = ""          # text encoder; empty: the one that the checkpoint was trained with
batch_size = 32            # pictures generated at once, and shown to Inception and CLIP at once (>= 1)
out = ""                   # folder of the pictures and results; empty: scores/NAME, by the run or images folder
device = "auto"            # cuda, mps or cpu; auto: the best of these that the machine has

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from common.files import hash_of, write_json
from common.folders import claim, differences, lock
from common.images import MOST, open_image, picture_grid, save_picture
from common.machine import pick_device
from common.processes import join, run_script
from encoders import load_vae, warn_of_cut
from evaluation import features, frechet, nearest, prompts
from evaluation.clip import Clip
from evaluation.inception import load_inception
from pictures import shapes
from pictures.captions import TABLES, caption_chooser
from pictures.decode import load_picture
from pictures.sources import EMOJI, find_parts, fingerprint
from sampling import generated
from sampling.pipeline import load as load_pipeline
from training import checkpoint as checkpoints

SEED = 2024  # picture i starts from noise that depends on SEED + i alone
CLIPS = {"clip_fid": "openai/clip-vit-base-patch32", "clip_score": "openai/clip-vit-base-patch16"}
DISTANCES = {"fid": ".npz", "clip_fid": ".clip.npz"}  # endings of the files with the reference's statistics
COLUMNS = ("attributes", "attributes_shapes", "attributes_chance")  # of the pictures, of the set's own, of others
OURS = r"results\.json|reference(\.clip)?\.npz|guidance_.*|(shapes|emoji)(_unseen)?(_.*\.png)?"  # names in OUT


@dataclass
class Pictures:
    """Pictures that are judged together"""
    name: str  # subfolder of OUT, or --images
    source: str  # where the prompts are from
    items: list  # [(path, prompts.Prompt)]
    scale: float = None  # guidance scale of those that are generated

    def jobs(self):
        """Return [(name, prompt, seed)] of the pictures to generate."""
        return [(path.name, prompt.caption, SEED + i) for i, (path, prompt) in enumerate(self.items)]


def check_settings(chosen, distances, sources):
    """Refuse what does not fit together."""
    is_folder = bool(reference) and Path(reference).is_dir()
    for refused, message in (
            ("nearest" in chosen and not (reference or sources[0] in EMOJI), "nearest needs a --reference of pictures"),
            ("nearest" in chosen and images and not vae, "nearest with --images needs a --vae"),
            (images and captions in EMOJI, f"leave --captions {captions} out: the prompts are inside the pictures"),
            ("attributes" in chosen and not set(sources) <= set(prompts.SHAPES),
             "the metric attributes is for the built-in set: --captions shapes"),
            (images and (checkpoint or count or tuple(guidance_scales) != (-1.0,)),
             "leave checkpoint, guidance_scales and count out with --images"),
            (distances and not is_folder and not (reference.endswith(".npz") and Path(reference).is_file()),
             f"{' and '.join(distances)} need a --reference: '{reference}' is neither a folder nor an .npz file"),
            (matched and not (distances and is_folder and captions and not prompts.in_order(captions)),
             "matched needs a --reference folder, and --captions that name its pictures")):
        if refused:
            raise ValueError(message)


def choose_prompts(source, of_emoji, limit):
    """Return the Prompts of a source; of emoji those that were trained on, and as many as there are."""
    every = prompts.read_prompts(source, count, of_emoji)
    if source not in EMOJI:
        return prompts.choose(every, count)
    every = every[:source == "emoji" and limit or None]
    return prompts.choose(every, min(count or prompts.FEW, len(every)))


def existing_pictures(chosen):
    paths = prompts.pictures_of(images)
    needed = {"clip_score", "attributes", "nearest"}.intersection(chosen)
    wanted = prompts.prompts_of(images, paths, captions) if needed else [prompts.Prompt("")] * len(paths)
    return Pictures(images, captions, list(zip(paths, wanted)))


def pictures_to_generate(pipeline, prompt_lists, folder):
    """Return the Pictures of all prompts at each guidance scale."""
    sets = []
    for source, wanted in prompt_lists.items():
        if not wanted:
            continue  # a font without skin tones
        for scale in (s if s >= 0 else pipeline.guidance_scale for s in guidance_scales):
            name = f"{source}/guidance_{scale:g}" if source in prompts.OF_SETS else f"guidance_{scale:g}"
            items = [(folder / name / f"{i:05d}.png", prompt) for i, prompt in enumerate(wanted)]
            sets.append(Pictures(name, source, items, scale))
    return sets


def reference_pictures(wanted):
    """Return the paths of the reference's pictures; with `matched` those of the prompts alone."""
    if not matched:
        return prompts.pictures_of(reference)
    above = [f for f in (Path(reference).parent, Path(reference)) if (f / wanted[0].picture).is_file()]
    paths = [(above or [Path(reference)])[0] / prompt.picture for prompt in wanted]  # which may begin with the folder
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ValueError(f"{len(missing):,} of the pictures that {captions} names are missing: {missing[0]}, ...")
    return paths


def measure_reference(networks, paths, side, folder, processes):
    items = [(path, None) for path in paths]
    rows, said = features.measure(networks, items, side, 0, batch_size, reference, processes)
    for metric in networks if processes.rank == 0 else ():
        about = networks[metric].about | said | {"resolution": side, "source": reference, "matched": matched}
        frechet.save_statistics(folder / f"reference{DISTANCES[metric]}", *frechet.gaussian(rows[metric]), about)


def load_reference(networks, file, side):
    """Return {metric: (mu, sigma)} and {metric: how they were made} from FILE.npz and FILE.clip.npz."""
    statistics, said = {}, {}
    for metric, network in networks.items():
        path = file.with_suffix(DISTANCES[metric])
        mu, sigma, about = frechet.load_statistics(path)
        if "resolution" not in about:
            about["made"] = "by another program, which does not say how: --resize must be what that used"
        now = network.about | {"resolution": side, "features": network.width}
        if differ := differences(about | {"features": len(mu)}, now):
            raise ValueError(f"{path} does not fit these pictures ({'; '.join(differ)}): give the same settings, or "
                             "a --reference folder")
        statistics[metric] = mu, sigma
        said[metric] = about | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return statistics, said


def judge(pictures, rows, count_and_hash, statistics):
    values = {metric: of_all.mean() if metric == "clip_score" else
              frechet.distance(*frechet.gaussian(of_all), *statistics[metric])
              for metric, of_all in rows.items() if metric != "nearest"}
    about = {"folder": pictures.name, "guidance_scale": pictures.scale, "captions": pictures.source or "its own"}
    return about | count_and_hash | {metric: round(float(value), 4) for metric, value in values.items()}


def save_grid(pictures, folder):
    """Write a grid of the first pictures of a set."""
    shown = pictures.items[:MOST]
    grid = picture_grid([load_picture(path, 1) for path, _ in shown], 8, [prompt.caption for _, prompt in shown])
    save_picture(folder / f"{pictures.source}_{Path(pictures.name).name}.png", grid)


def attribute_scores(pictures, side):
    """Return the scores in COLUMNS."""
    images = [load_picture(path, 1) for path, _ in pictures.items]
    scenes = [shapes.scene(prompts.FIRST_SCENE + i, prompts.SHAPES[pictures.source], side)[0]
              for i in range(len(images))]
    wanted = [prompt.attributes for _, prompt in pictures.items]
    return {column: {name: list(n) for name, n in shapes.score(shown, wanted).items()}
            for column, shown in zip(COLUMNS, (images, scenes, scenes[1:] + scenes[:1]))}


def print_results(entries, said, folder, side):
    for entry in entries:
        print(f"{entry['folder']}: {entry['pictures']:,} pictures at {side} px")
        for metric, how in (("fid", f"resize {resize}"), *CLIPS.items()):
            made = said.get(metric, {}).get("made", "")
            if metric in entry:
                print(f"  {metric:12} {entry[metric]:9.4f}   ({how}{'; the reference was made ' * bool(made)}{made})")
        for name, (right, of, chance) in entry.get("nearest", {}).items():
            print(f"  nearest {name} {100 * right / of:5.1f} %  ({right} of {of};  chance {100 * chance:.2f} %)")
        for name, (right, of) in entry.get("attributes", {}).items():
            percents = [f"{100 * entry[column][name][0] / max(of, 1):5.1f} %" for column in COLUMNS]
            print(f"  {name:12} {percents[0]}  ({right} of {of};  shapes {percents[1]}, chance {percents[2]})")
    print(f"all files are in {folder}")


def choose_work(data):
    """Return (where prompts are from, the chosen metrics) for a run with these settings of its data, or --images."""
    if captions or images:
        sources = (captions,)
    elif "nearest" in metrics and reference:
        sources = (reference,)  # whose captions are the prompts
    else:
        sources = prompts.SETS[data["source"] if data.get("source") in prompts.SETS else "shapes"]
    of_set = ("attributes",) if sources[0] in prompts.SHAPES else ("nearest",) if sources[0] in EMOJI else ()
    return sources, tuple(metrics) or of_set or (*DISTANCES, "clip_score")


def known_pictures(vae, of_emoji, folder_captions, side, torch_device):
    """Return the Latents that nearest pictures are found by, and (captions, latents) of those that are known."""
    latents = nearest.Latents(vae, torch_device)
    table = captions if captions.lower().endswith(TABLES) else ""
    choose, source = caption_chooser(table, folder_captions), reference or "emoji_all"
    known = nearest.read_reference(source, choose, latents, side, of_emoji if source in EMOJI else "")
    latents.about |= {"pictures": len(known[0]), "captions_sha256": hash_of(known[0]),
                      "pictures_sha256": hashlib.sha256(known[1].numpy().tobytes()).hexdigest()}
    return latents, known


def results_of(sets, measured, statistics, known, chosen, side, folder):
    """Return the scores of each set of pictures, and write the grids of built-in sets."""
    entries = [judge(pictures, *m, statistics) for pictures, m in zip(sets, measured)]
    for entry, pictures, (rows, _) in zip(entries, sets, measured):
        if pictures.source in prompts.OF_SETS:
            save_grid(pictures, folder)
        if "attributes" in chosen:
            entry |= attribute_scores(pictures, side)
        if "nearest" in chosen:
            wanted = [prompt.caption for _, prompt in pictures.items]
            entry["nearest"] = nearest.score(torch.from_numpy(rows["nearest"]), wanted, *known)
    return entries


def main():
    run = None if images else checkpoints.find(checkpoint)
    trained_on = checkpoints.run_of(run).get("data", {}) if run else {}
    data = trained_on.get("settings", {})  # by which it was prepared
    of_emoji = font or data.get("font", "")
    sources, chosen = choose_work(data)
    distances = [metric for metric in DISTANCES if metric in chosen]
    by_reference = sources == (reference,) and not (captions or images)
    asked = sources if (run or matched and captions) and not by_reference else ()
    prompt_lists = {source: choose_prompts(source, of_emoji, data.get("limit")) for source in asked}
    check_settings(chosen, distances, sources)
    if sources[0] in EMOJI and data.get("source") in EMOJI and trained_on["source_hash"] != hash_of(
            fingerprint(find_parts(data["source"], 4096, of_emoji)) | {"times in the source": ""}):
        raise ValueError(f"this font of emoji is not the one that {run} was trained on: give that with --font")
    folder = prompts.scores_folder(
        out, images or (run.parent if run.stem.startswith("step_") else run.with_suffix("")))
    sets = [existing_pictures(chosen)] if images else []
    real = reference_pictures(prompt_lists.get(captions)) if distances and Path(reference).is_dir() else []
    processes = join()
    processes.from_first(lambda: lock(folder))
    torch_device = pick_device(device)
    torch.backends.cudnn.allow_tf32 = False  # as for published numbers
    networks = {metric: load_inception(inception, torch_device, resize) if metric == "fid" else
                Clip(CLIPS[metric], torch_device) for metric in chosen if metric not in ("attributes", "nearest")}
    if run:
        pipeline = load_pipeline(run, torch_device, vae=vae, text_encoder=text_encoder)
        if not captions and sources[0] in prompts.SHAPES and not {*shapes.SIZES, "background"} <= {*pipeline.words}:
            raise ValueError(f"{run} was not trained on the built-in set: name prompts with --captions")
    own_side = pipeline.size if run else min(open_image(sets[0].items[0][0]).size)
    side = resolution or own_side
    if side > own_side:
        raise ValueError(f"resolution is {side}: it must be at most {own_side}, the side of the pictures in pixels")
    known = None
    if "nearest" in chosen:
        networks["nearest"], known = known_pictures(pipeline.vae if run else load_vae(vae, torch_device), of_emoji,
                                                    data.get("folder_captions", ""), side, torch_device)
        if by_reference:
            prompt_lists[reference] = prompts.choose([prompts.Prompt(caption) for caption in known[0]], count)
    sets = pictures_to_generate(pipeline, prompt_lists, folder) if run else sets
    texts = [prompt.caption for pictures in sets for _, prompt in pictures.items]
    if missing := "nearest" in chosen and {*texts} - {*known[0]}:
        raise ValueError(f"{reference or 'emoji_all'} has no picture for {len(missing):,} of the prompts, for example "
                         f"'{min(missing)}'")
    jobs = [job for pictures in sets for job in pictures.jobs()]
    protocol = {"images": images, "reference": reference, "matched": matched, "metrics": chosen, "resolution": side,
                "networks": {metric: {"name": n.name, **n.about} for metric, n in networks.items()},
                "guidance_scales": [pictures.scale for pictures in sets], "prompts_sha256": hash_of(jobs)}
    if run:
        protocol |= generated.describe(pipeline, jobs, steps=steps, sampler=sampler)
    for encoder in (run and pipeline.text_encoder, networks.get("clip_score")) if processes.rank == 0 else ():
        warn_of_cut(encoder.longer(texts) if encoder else 0, encoder)
    comparing = {metric: networks[metric] for metric in distances}
    if not real:
        statistics, said = load_reference(comparing, Path(reference), side)
    processes.from_first(lambda: claim(folder, "scores.json", OURS, protocol))
    if real:  # before the generating, as it may be at fault
        measure_reference(comparing, real, side, folder, processes)
    for pictures in sets if run else ():
        generated.fill(pipeline, folder / pictures.name, pictures.jobs(), batch_size, processes, steps=steps,
                       sampler=sampler, guidance_scale=pictures.scale)
    processes.gather()  # every process measures what others generated
    measured = [features.measure(networks, pictures.items, side, own_side, batch_size, pictures.name, processes)
                for pictures in sets]
    if processes.rank == 0:
        if real:
            statistics, said = load_reference(comparing, folder / "reference.npz", side)
        entries = results_of(sets, measured, statistics, known, chosen, own_side, folder)
        protocol |= {"reference": said, "checkpoint": pipeline.name if run else None,
                     "software": {name: version(name) for name in ("torch", "pillow", "transformers")}}
        write_json(folder / "results.json", {"results": entries, "protocol": protocol})
        print_results(entries, said, folder, side)
    processes.leave()


if __name__ == "__main__":
    run_script("eval_fid.py", main)
