"""Converts backbones between the hub layout and Orbax.

    python -m reoac_jax.convert SOURCE TARGET [--dtype bfloat16] [--base-config FILE] [--to hf]
    python -m reoac_jax.convert last.ckpt TARGET --family mdlm --set length=1024

A hub directory of E2D2, MDLM or SEDD (config.json and PyTorch or safetensors weights) or a training
checkpoint of MDLM (.ckpt) or SEDD (.pth) becomes an Orbax checkpoint with backbone.json, and the
other way round. Moving averages are preferred to the raw weights. Sizes are read from the tensors;
the source of every value is printed. Nothing is overwritten without --force, and the target appears
only when complete.
"""

import argparse
import sys
from collections.abc import Sequence

from common.errors import UserError
from common.flags import EXIT_USER_ERROR, one_line

FAMILIES = ("e2d2", "mdlm", "sedd")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 and one line on stderr for bad input)."""
    parser = argparse.ArgumentParser(prog="python -m reoac_jax.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="hub directory, converted directory, weight file, hub name")
    parser.add_argument("target", help="directory to write")
    parser.add_argument(
        "--family",
        default="auto",
        choices=("auto", *FAMILIES),
        help="what the source must be; auto: what its config.json says",
    )
    parser.add_argument("--dtype", default="float32", help="stored: float32 | bfloat16 | float16")
    parser.add_argument("--base-config", help="config.json of the base model (Qwen3)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="MDLM, SEDD: a value that neither config.json nor a tensor shows (length, num_heads)",
    )
    parser.add_argument("--to", choices=("orbax", "hf"), help="default: the other layout")
    parser.add_argument("--force", action="store_true", help="replace a backbone at the target")
    options = parser.parse_args(arguments)
    try:
        convert(options)
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def convert(options: argparse.Namespace) -> None:
    """Loads the source, writes the target and prints what was derived from where."""
    from reoac_jax.backbone import dit_config, store

    store.stored_dtype(options.dtype)  # before minutes of reading
    overrides = dit_config.parse_overrides(options.set)
    family = None if options.family == "auto" else options.family
    backbone = store.load_backbone(options.source, options.base_config, family, overrides)
    converted = (backbone.directory / store.DESCRIPTION).is_file()
    layout = options.to or ("hf" if converted else "orbax")
    write = store.save_hub if layout == "hf" else store.save_converted
    store.write_directory(
        options.target, lambda path: write(path, backbone, options.dtype), options.force
    )
    for field, source in backbone.provenance.items():
        print(f"{field:20} {getattr(backbone.config, field, '')!s:16} {source}")
    print(f"{layout} backbone written to {options.target}")


if __name__ == "__main__":
    sys.exit(main())
