"""What a malicious site's SuperNode starts in place of an honest ClientApp: imported by Python itself, by PYTHONPATH.

FEDLORA_HOSTILE says, with commas between, what its reply to the training message of each round is.
"""

import os
import sys


def _spoil(kinds: list[str]) -> None:
    import pickle

    import numpy as np
    from flwr.app import Array, ArrayRecord, Message
    from flwr.clientapp import ClientApp

    honest = ClientApp.__call__

    def hostile(self, message, context):  # type: ignore[no-untyped-def]
        reply = honest(self, message, context)
        if not message.metadata.message_type.startswith("train"):
            return reply
        from fedlora import wire

        kind = kinds[(int(message.metadata.group_id) - 1) % len(kinds)]
        content = reply.content
        name = next(key for key in content if key.startswith("reduced."))
        tensors = wire.decode(content[name])
        first = next(iter(tensors))
        if kind == "nan":
            tensors[first] = np.full_like(tensors[first], np.nan)
        elif kind == "names":
            tensors["patient"] = tensors.pop(first)
        elif kind == "shapes":
            tensors[first] = tensors[first][:, :1]
        elif kind == "many":
            one = np.zeros(1, dtype=np.float32)
            tensors = {f"key-{number}": one for number in range(1_000_000)}
        elif kind == "scaled":
            tensors = {key: value * np.float32(1e6) for key, value in tensors.items()}
        elif kind == "large":
            tensors[first] = np.ones((1 << 29,), dtype=np.float32)
        content[name] = wire.encode(tensors)
        if kind == "pickle":
            data = pickle.dumps(tensors)
            content[name] = ArrayRecord({"a": Array(dtype="uint8", shape=(len(data),), stype="pickle", data=data)})
        if kind == "claims":
            header = dict(content["reply"])
            header["examples"] = [value * 1_000_000 for value in header["examples"]]
            header["values"] = [
                value * 1_000_000 if key == "weight" else value
                for key, value in zip(header["numbers"], header["values"], strict=True)
            ]
            content["reply"] = wire.config_record(header)
        if kind == "other":
            header = dict(content["reply"])
            header["clients"] = [0]
            content["reply"] = wire.config_record(header)
        return Message(content, reply_to=message)

    ClientApp.__call__ = hostile  # type: ignore[method-assign]


if os.environ.get("FEDLORA_HOSTILE") and any("flwr-clientapp" in part for part in sys.orig_argv):
    _spoil(os.environ["FEDLORA_HOSTILE"].split(","))
