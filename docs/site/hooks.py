# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Adds pages to the site that are elsewhere in the repository: the results, and the executed tutorials."""

import base64
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Links within the repository, and the same targets on the site.
_ELSEWHERE = {
    r"\]\((?:\.\./)*benchmarks/RESULTS\.md": "](results.md",
    r"\]\((?:\.\./)*pyro_apd/kernels/psgld\.py\)": "](reference/sampling.md#pyro_apd.PSGLD)",
    r"\]\((?:\.\./)*tutorials/(\w+)\.ipynb": r"](tutorials/\1.md",
}


def on_files(files, config):
    """Adds a page for each tutorial, and one for the results with their pictures."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    files.append(File.generated(config, "results.md", content=results))
    for name in sorted(set(re.findall(r"\]\((results/\w+\.png)\)", results))):
        files.append(File.generated(config, name, content=(ROOT / "benchmarks" / name).read_bytes()))
    lines = ["# Tutorials", "", "Each takes less than three minutes on two cores.", ""]
    for path in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        page, pictures = _page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
        lines.append(f"* [{page.splitlines()[0].lstrip('# ')}]({path.stem}.md)")
    files.append(File.generated(config, "tutorials/index.md", content="\n".join(lines)))
    return files


def on_page_markdown(markdown, page, **_):
    """Rewrites links to files of the repository as links within the site."""
    depth = page.file.src_uri.count("/")
    for pattern, target in _ELSEWHERE.items():
        markdown = re.sub(pattern, target.replace("](", "](" + "../" * depth), markdown)
    return markdown


def _cells(path):
    """Cells of the notebook of a source; if it was not executed, cells of the source, without outputs."""
    notebook = path.with_suffix(".ipynb")
    if notebook.exists():
        return json.loads(notebook.read_text())["cells"]
    parts = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    cells = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        is_prose = "[markdown]" in kind
        source = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_prose else body
        cells.append({"cell_type": "markdown" if is_prose else "code", "source": source.strip()})
    return cells


def _page(path):
    """A tutorial as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in _cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # Links between tutorials, and to pages outside the folder.
            source = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.md", source)
            source = source.replace("](../docs/", "](../").replace(
                "](../CONTRIBUTING.md)", "](../how_to.md#add-a-kernel)"
            )
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif output["output_type"] == "stream" or "text/plain" in data:
                text = "".join(output.get("text") or data["text/plain"])
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures
