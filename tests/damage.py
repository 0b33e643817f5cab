"""Ways to change a compressed folder: by accident, or as an attacker would."""

import hashlib
import json
import struct
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError

PROOFS = "proofs/products.safetensors"


def rewrite(path: Path, change, **metadata: str) -> None:
    """`change` edits a safetensors file's tensors in place; its metadata stays, except for what is given."""
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}) | metadata
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def bind(folder: Path) -> None:
    """Write the digest of the permutations everywhere it is stored, as an attacker would."""
    stored = load_file(folder / "permutations.safetensors")
    content = b"".join(
        name.removesuffix(".input_permutation").encode() + b"\0" + struct.pack(f"<{p.numel()}i", *p.int().flatten())
        for name, p in sorted(stored.items(), key=lambda entry: entry[0].removesuffix(".input_permutation"))
    )
    digest = hashlib.sha256(content).hexdigest()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["permutations_digest"] = digest
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("model*.safetensors"):
        rewrite(path, lambda tensors: None, ria_permutations_digest=digest)


def bind_proofs(folder: Path) -> None:
    """Write the digest of the proofs into config.json, as an attacker would."""
    stored = {name.removesuffix(".proof"): proof for name, proof in load_file(folder / PROOFS).items()}
    content = b"".join(
        name.encode() + b"\0" + struct.pack(f"<{proof.numel()}f", *proof.flatten().tolist())
        for name, proof in sorted(stored.items())
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["proofs"]["digest"] = hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def prove(folder: Path) -> None:
    """Write the proofs of what a folder holds by now, so that nothing shows that it was changed."""
    reader = Reader(folder)
    found = {f"{name}.proof": proof for name, proof in reader.proved(reader.schema)}
    save_file(found, folder / PROOFS)
    bind_proofs(folder)


def problems(folder: Path) -> list[str]:
    """What the reader finds wrong with a folder, whether or not it can be opened."""
    try:
        return list(Reader(folder).problems())
    except RiaError as error:
        return [str(error)]


class Damage:
    """A private copy of a compressed folder whose tensors and config can be replaced."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file_of(self, tensor: str) -> Path:
        if tensor.endswith(".input_permutation"):
            return self.folder / "permutations.safetensors"
        return (
            self.folder / json.loads((self.folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]
        )

    def replace(self, tensor: str, change) -> None:
        """`change` maps the tensor to its new content, or to None to leave it out."""

        def apply(tensors):
            changed = change(tensors.pop(tensor).clone())
            if changed is not None:
                tensors[tensor] = changed.contiguous()

        rewrite(self.file_of(tensor), apply)

    def rename(self, module: str, name: str) -> None:
        """Give a module's tensors another name, in the weights, the index, the permutations and the proofs."""

        def apply(tensors):
            for key in [key for key in tensors if key.startswith(f"{module}.")]:
                tensors[name + key.removeprefix(module)] = tensors.pop(key)

        for path in self.folder.rglob("*.safetensors"):
            rewrite(path, apply)
        self.edit_json("model.safetensors.index.json", lambda content: apply(content["weight_map"]))
        bind(self.folder)
        bind_proofs(self.folder)

    def edit_json(self, file: str, change) -> None:
        """`change` edits the parsed content in place."""
        path = self.folder / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
