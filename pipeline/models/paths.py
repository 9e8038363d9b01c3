"""Where a model is: the bundled folder, a local folder or the Hub. Imports no torch."""

from pathlib import Path

from pipeline.errors import UserError

BUNDLED_MODEL = Path(__file__).parent / "bundled"


def resolve_model(path: str, key: str) -> str:
    """Turns `bundled`, a local folder or a Hub id into what transformers loads.

    Args:
        path: The value of the config key.
        key: The config key, for messages (`student.path`).

    Raises:
        UserError: The value looks like a local folder but is none, or the folder holds no model.
    """
    if path == "bundled":
        return str(BUNDLED_MODEL)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{key}: {path!r} holds no config.json, so it is not a model folder; set the "
                "folder that save_pretrained() wrote"
            )
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{key}: {path!r} is not a folder; set 'bundled', the path of a local model folder or "
            "a Hub id such as meta-llama/Llama-3.2-1B-Instruct"
        )
    return path
