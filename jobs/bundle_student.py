"""Put a distilled student into the package: float16 weights, the same folder layout.

python jobs/bundle_student.py SOURCE ddray/models/bundled/digits-llamagen-dd
"""

import sys

from ddray.models.zoo import load_student
from ddray.storage.checkpoint import load_folder, save_folder


def main(source: str, target: str) -> None:
    """Copy a student folder with its weights halved; the loader widens them again."""
    config, model, tokenizer = load_folder(source)
    half = [{name: x.half() for name, x in (state or {}).items()} for state in (model, tokenizer)]
    save_folder(target, config, model=half[0], tokenizer=half[1])
    print(f"{target}: {load_student(target).config['step']} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
