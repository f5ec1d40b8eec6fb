# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The runtime is taken from a folder, or from an archive whose integrity is known."""

import base64
import gzip
import hashlib
import io
import json
import tarfile

import pytest

from pyro_apd.page import runtime

FILES = {runtime.LIBRARY: b"window.ort = 1;", runtime.SCRIPT: b"export default 2;", runtime.PROGRAM: b"\0asm" * 100}


def parts(script):
    library, _, rest = script.partition("\nwindow.APD_RUNTIME = ")
    found = json.loads(rest.rstrip().removesuffix(";"))
    return library, found["script"], gzip.decompress(base64.b64decode(found["wasm"]))


def test_a_folder(tmp_path):
    (tmp_path / "dist").mkdir()
    for name, contents in FILES.items():
        (tmp_path / "dist" / name).write_bytes(contents)
    first = runtime.runtime_script(tmp_path)
    assert parts(first) == ("window.ort = 1;", "export default 2;", b"\0asm" * 100)
    assert runtime.runtime_script(tmp_path / "dist") == first
    (tmp_path / "dist" / runtime.PROGRAM).unlink()
    with pytest.raises(ValueError, match=r"lacks \['ort-wasm-simd-threaded.wasm'\].*npm pack onnxruntime-web@"):
        runtime.runtime_script(tmp_path)


def test_an_archive_is_the_one_that_is_pinned(tmp_path, monkeypatch):
    path = tmp_path / "runtime.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, contents in FILES.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(contents)
            archive.addfile(entry, io.BytesIO(contents))
    with pytest.raises(ValueError, match="is not onnxruntime-web"):
        runtime.runtime_script(path)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    monkeypatch.setattr(runtime, "INTEGRITY", f"sha512-{digest}")
    assert parts(runtime.runtime_script(path))[2] == b"\0asm" * 100
    with pytest.raises(FileNotFoundError):
        runtime.runtime_script(tmp_path / "absent.tgz")
