"""Makes the folders of the tiny models: configuration and tokenizer, without weights.

    python data/make_tiny.py [--data data] [--out data]

They have the architectures of Megrez-3B-Omni (`tiny`), Megrez-3B-Instruct (`tiny_instruct`), MiniCPM-2B
(`tiny_minicpm`), the thinker of Qwen2.5-Omni (`tiny_qwen_omni`) and Gemma 4 (`tiny_gemma4`). Their tokenizers know the
words of the samples as single tokens, and spell any other text in bytes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_models.gemma4 import gemma4
from tiny_models.megrez import megrez_instruct, megrez_omni
from tiny_models.minicpm import minicpm
from tiny_models.qwen_omni import qwen_omni

FOLDERS = {
    "tiny": megrez_omni,
    "tiny_qwen_omni": qwen_omni,
    "tiny_gemma4": gemma4,
    "tiny_instruct": megrez_instruct,
    "tiny_minicpm": minicpm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folders of the tiny models, without weights.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the samples")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write the models' folders to")
    args = parser.parse_args()
    for name, make in FOLDERS.items():
        make(args.data).write(args.out / name)


if __name__ == "__main__":
    main()
