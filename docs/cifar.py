"""
Write tars of PNGs and captions from CIFAR-10's binary version: 4,000 pictures to train on, 400 to validate on.

    python docs/cifar.py data/cifar-10-binary.tar.gz    # writes cifar10-train.tar and cifar10-val.tar beside it
"""
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("an airplane", "an automobile", "a bird", "a cat", "a deer", "a dog", "a frog", "a horse", "a ship",
           "a truck")

if len(sys.argv) != 2:
    raise SystemExit(__doc__)
archive = Path(sys.argv[1])
with tarfile.open(archive) as source:
    for out, batch, count in (("train", "data_batch_1", 4000), ("val", "test_batch", 400)):
        records = source.extractfile(f"cifar-10-batches-bin/{batch}.bin").read()[:count * 3073]
        with tarfile.open(archive.with_name(f"cifar10-{out}.tar"), "w") as tar:
            for i, record in enumerate(np.frombuffer(records, np.uint8).reshape(-1, 3073)):  # the class, then 3 planes
                png, text = io.BytesIO(), io.BytesIO(f"a photo of {CLASSES[record[0]]}".encode())
                Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0).copy()).save(png, "PNG")
                for suffix, file in (("png", png), ("txt", text)):
                    entry = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    entry.size = file.getbuffer().nbytes
                    file.seek(0)
                    tar.addfile(entry, file)
