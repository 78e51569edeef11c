"""`interp generate`: continue prompts, and write what was generated token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.cli.options import BosOption, DeviceOption, DtypeOption, ModelOption, bos_policy
from interp.errors import InterpError

if TYPE_CHECKING:
    from interp.interventions import AttentionChange

SUFFIXES = (".parquet", ".csv")


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to be continued.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text (one prompt a line), or .csv or .jsonl as for --pairs.")
    ] = None,
    model: ModelOption = "smollm2",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that each text gets at most.")] = 64,
    n: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that hold this share.")] = None,
    seed: Annotated[int, typer.Option(help="Determines the samples.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a row. Can be repeated.")] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="An attention edit or mask, such as 'keys=0 gain=0 phase=decoding'. Can be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward.")] = 32,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A .parquet or .csv file with a row for each generated token.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    bos: BosOption = None,
) -> None:
    """Generate text, and say how sure the model was of each token.

    Prints the texts; --out writes log-probability, entropy and margin of every token.
    """
    if out is not None and (out.suffix not in SUFFIXES or out.is_dir()):
        raise InterpError(f"--out {out}: the name of a .parquet or .csv file expected")
    items = [*(prompts or []), *_read(data or [])]
    if not items:
        raise InterpError("nothing to continue: give a text, or --data with a file of prompts")
    from interp.model.load_model import load

    edits, policy = [_change(text) for text in edit or []], bos_policy(bos)
    written = load(model, dtype=dtype, device=device, bos=policy).generate(
        items, max_new_tokens, n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop or None,
        edits=edits, batch_size=batch_size,
    )  # fmt: skip
    for row in written.rows:
        name = f"{row.example}" + (f".{row.sample}" if n > 1 else "")
        typer.echo(f"{name} ({row.end}): {row.text!r}")
    if out is not None:
        _write(written, out)
        typer.echo(f"{sum(len(row.ids) for row in written.rows)} tokens; wrote {out}", err=True)


def _change(text: str) -> AttentionChange:
    from interp.interventions import Write, parse_change

    change = parse_change(text)
    if isinstance(change, Write):
        raise InterpError(f"--edit {text!r}: generate takes attention edits and masks, and this writes an activation")
    return change


def _read(files: list[Path]) -> list[Any]:
    from interp.prompts.files import read_prompts, read_texts

    items: list[Any] = []
    for file in files:
        items += read_prompts(file) if file.suffix.lower() in (".csv", ".jsonl", ".json") else read_texts(file)
    return items


def _write(written: Any, out: Path) -> None:
    import pyarrow as pa

    from interp.results.parquet import write_parquet
    from interp.utils.files import result_file

    if out.suffix == ".parquet":
        table = pa.Table.from_pandas(written.frame(), preserve_index=False)
        write_parquet(table, out, kind="generations", provenance=written.provenance)
        return
    with result_file(out) as file:
        file.write(written.frame().to_csv(index=False).encode())
