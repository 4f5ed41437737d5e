"""Files for a GPU machine that is available for minutes, has no network and takes files in parts of some MiB.

    python -m benchmarks.gpu --prepare KIT          here, where there is a network and time
    python -m benchmarks.gpu --kit KIT --minutes 12     there, with as many parts of KIT as were copied

KIT/
  store/      stays here: every blob complete, and store.json, the files of each item
  part-01/    travels: pieces of blobs, and index.json, the same in every part
  part-02/    …

An *item* (plan.py) is a set of files: `cubins`, wheels, an engine, a checkpoint. A *file* is a blob, or a blob with
gaps that are filled with weights (weightless.py): these are drawn again from their seed, or read from a checkpoint of
the source tree, so that most of 13 GB need not be copied. A *blob* is stored under its SHA-256, once for all items,
compressed where that helps. Blobs are cut into *pieces* that fill the parts, the most important first.

Every file has its size and SHA-256 in the index and is verified when it is put in its place. A part that was not copied
is named in the error, and only the items with pieces in it are missing.
"""
