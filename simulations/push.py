"""``fedlora push``: a run's exported adapter and its model card to the Hugging Face hub, and nothing else of the run.

What is uploaded is a list of file names, not the folder: a file that is not on it stays here, whatever put it there.
Ledgers, clients' own tensors, checkpoints, rows and partition are in other folders, and are never read.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.config import SMALL_LLAMA
from fedlora.lora_files import CONFIG, WEIGHTS
from fedlora.messages import first_line
from fedlora.reports.adapters import adapter_of
from fedlora.reports.run import Run

CARD = "README.md"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Names of the files that a tokenizer has, those of each kind."""
PUBLIC = (CARD, CONFIG, WEIGHTS, "ranks.json", *TOKENIZER)
"""Names of the files that are uploaded where an adapter has them: the adapter, its tokenizer and its card."""
SIGNED = ("manifest.json", "manifest.sig")
"""The signature of a deployed federation's adapter; of use only beside the very files that were signed."""
_OWN = ("minilm", SMALL_LLAMA)  # models that come with fedlora
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedlora push``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository; it is made where it is not there")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--client", type=int, metavar="N", help="this client's own adapter, where they have own ones")


def run_push(options: argparse.Namespace, console: Console) -> int:
    """Upload an adapter, and print where it is.

    Raises:
        ValueError: The run has no such adapter, the name or the token cannot be used, or the hub refuses.
    """
    run = Run.read(options.run.expanduser().resolve())
    folder = adapter_of(run, options.client)
    name = checked_name(options.repository)
    files = public_files(folder, run.config.model.name)
    if options.client is not None:
        console.print(
            f"note: this is client {options.client}'s own adapter, with the tensors that it never sent", markup=False
        )
    where = _upload(name, files, options.private, f"{run.config.strategy.name} adapter of {run.path.name}")
    left = sorted(path.name for path in folder.iterdir() if path.name not in files)
    if left:
        console.print(f"not uploaded: {', '.join(left)}", markup=False)
    console.print(f"uploaded {len(files)} files: {where}", markup=False)
    return 0


def checked_name(name: str) -> str:
    """Return the name of a repository.

    Raises:
        ValueError: The hub has no such names.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    reason = "it is not owner/name"
    if name.count("/") == 1 and all(name.split("/")):
        try:
            validate_repo_id(name)
            return name
        except HFValidationError as error:
            reason = first_line(error)
    raise ValueError(
        f"{name!r} cannot be a repository of the hub: {reason}; write it as owner/name, such as me/adapter."
    )


def public_files(folder: Path, base: str) -> dict[str, bytes]:
    """Return what is uploaded of an adapter's folder, by name: regular files on the list, without this machine's paths.

    PEFT writes the base model's path into the adapter's configuration. The hub takes a name of its own only, and others
    have no use for a path of this machine, which may tell more than it should: it becomes the folder's name.

    Args:
        folder: The adapter's folder.
        base: The base model, ``model.name`` of the run.

    Raises:
        ValueError: Configuration, weights or card are not there.
    """
    files = {
        name: (folder / name).read_bytes()
        for name in (*PUBLIC, *SIGNED)
        if (folder / name).is_file() and not (folder / name).is_symlink()
    }
    for name in (CONFIG, WEIGHTS, CARD):
        if name not in files:
            raise ValueError(f"{folder}: has no {name}; the export of this run is not whole, so it is not uploaded.")
    before = dict(files)
    settings: dict[str, Any] = json.loads(files[CONFIG])
    path = str(settings.get("base_model_name_or_path", ""))
    if not is_hub_name(path):
        settings["base_model_name_or_path"] = short_name(base)
        files[CONFIG] = json.dumps(settings, indent=2).encode() + b"\n"
    if not is_hub_name(base):
        card = files[CARD].decode().replace(base, short_name(base))
        files[CARD] = re.sub(r"\A---\nbase_model:.*\n", "---\n", card).encode()
    if files != before:
        files = {name: content for name, content in files.items() if name not in SIGNED}
    return files


def is_hub_name(name: str) -> bool:
    """Return whether a model's name is one of the hub, and not a path or a model that comes with fedlora."""
    return _HUB_NAME.fullmatch(name) is not None and name not in _OWN and not Path(name).exists()


def short_name(base: str) -> str:
    """Return a model's name without the folders that it is in."""
    return Path(base).name if Path(base).is_absolute() or Path(base).exists() else base


def _upload(name: str, files: dict[str, bytes], private: bool, message: str) -> str:
    """Make the repository where it is not there, put all files there in one commit, and return its address.

    Raises:
        ValueError: There is no token, or the hub refuses or does not answer.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not get_token():
        raise ValueError("no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="fedlora")
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        where = api.create_repo(name, private=private or None, exist_ok=True)  # None: as its owner has it
        if private and not api.model_info(where.repo_id).private:
            raise ValueError(f"--private: {where} is there already, and public; choose another name.")
        api.create_commit(where.repo_id, additions, commit_message=message)
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or first_line(error)
        cure = {
            401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN",
            403: f"the token may not write to {name!r}; it needs the role write, and the owner must be yours",
        }.get(status, "nothing was changed by the step that failed; try again")
        raise ValueError(f"{name}: the hub {api.endpoint} refused ({status}: {reason}): {cure}.") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{name}: the hub {api.endpoint} cannot be reached ({first_line(error)}); try again when it can."
        ) from error
    return str(where)
