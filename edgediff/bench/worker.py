"""A contender's own process: calls the function that it is told to, and answers for it."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from edgediff.bench.machine import peak_memory
from edgediff.bench.turns import Call, Said
from edgediff.errors import EdgediffError
from edgediff_runtime.errors import EdgeRuntimeError, one_line


def main() -> None:
    """Serves one contender until its input ends."""
    with os.fdopen(os.dup(1), "wb") as answers:
        # What libraries print goes to standard error: answers have their own pipe.
        os.dup2(2, 1)
        call = msgspec.json.decode(sys.stdin.buffer.readline(), type=Call)
        try:
            for said in _start(call):
                _answer(answers, msgspec.structs.replace(said, peak_mib=peak_memory()))
                if not sys.stdin.buffer.readline():
                    return
        except (EdgediffError, EdgeRuntimeError) as e:
            _answer(answers, Said(says=str(e)))
        except Exception as e:  # a backend's own errors share no base class; the other contenders continue
            _answer(answers, Said(says=f"{type(e).__name__}: {one_line(e)}"))


def _start(call: Call) -> Iterator[Said]:
    module, _, name = call.function.rpartition(":")
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).parent))
        module = Path(module).stem
    turns: Iterator[Said] = getattr(importlib.import_module(module), name)(**call.given)
    return turns


def _answer(answers: IO[bytes], said: Said) -> None:
    answers.write(msgspec.json.encode(said) + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
