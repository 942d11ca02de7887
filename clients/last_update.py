"""The last update that left a deployed site, kept to be sent again when its round is asked again.

A coordinator that dies within a round asks for the round once more. What has left has been paid for, so sending the
same numbers again costs no privacy, where training again would.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedlora.codec import WireError
from fedlora.exchange import Instruction, Update
from fedlora.headers import HeaderReader, instruction_header, read_reports_header, reports_header
from fedlora.methods import tensors_digest
from fedlora.storage import write_whole

_GROUPS = ("tensors", "extra")


def question_digest(instruction: Instruction) -> str:
    """Return a digest of all that an update depends on: job, round, terms, numbers.

    Not of the ledger's entry that the server has last seen: it is another once the update has arrived.
    """
    header = json.dumps(instruction_header(replace(instruction, ledger_heads=())), sort_keys=True)
    parts = (header, tensors_digest(instruction.tensors), tensors_digest(instruction.extra))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@final
class LastUpdate:
    """A file with one update and the digest of what asked for it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, question: str, update: Update) -> None:
        """Put an update in the place of the one before, on the disk.

        Raises:
            OSError: It cannot be written.
        """
        header = {"question": question, "reports": json.dumps(reports_header([update.report]))}
        groups = zip(_GROUPS, (update.tensors, update.extra), strict=True)
        tensors = {f"{group}/{name}": value for group, values in groups for name, value in values.items()}
        write_whole(self.path, save(tensors, header))

    def answer_to(self, question: str) -> Update | None:
        """Return the update if this question is the one that it answered; None where it is another."""
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="numpy") as file:
                header, names = file.metadata() or {}, list(file.keys())
                if header.get("question") != question:
                    return None
                (report,) = read_reports_header(HeaderReader(json.loads(header["reports"]), "update"))
                tensors, extra = (
                    {
                        name.removeprefix(f"{group}/"): file.get_tensor(name)
                        for name in names
                        if name.startswith(f"{group}/")
                    }
                    for group in _GROUPS
                )
        except (SafetensorError, WireError, ValueError, KeyError):
            return None  # half a file of another version: the round is trained anew, and paid for
        return Update(report, tensors, extra)
