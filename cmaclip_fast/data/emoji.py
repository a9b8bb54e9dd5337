"""The data set `emoji`: pictures of two vendors from npm packages, with the tags of a third as texts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cmaclip_fast.data.files import Rows, near, read_files
from cmaclip_fast.data.named import NAMED
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import check_output_file, replacing, write_text


@dataclass(frozen=True)
class Package:
    """An npm package: `integrity` is the checksum of its tarball as npm writes it, `sha512-` and base64."""

    name: str
    version: str
    integrity: str

    @property
    def tarball(self) -> str:
        return f"{self.name}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
)
TAGS = Package(
    "emojibase-data",
    "16.0.3",
    "sha512-MopInVCDZeXvqBMPJxnvYUyKw9ImJZqIDr2sABo6acVSPev5IDYX+mf+0tsu96JJyc3INNvgIf06Eso7bdTX2Q==",
)
VENDORS = {"noto": "google", "twemoji": "twitter"}
"""Our name of a drawing style, and the packages' name of its vendor."""

TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
COLUMNS = ("id", "image", "emoji", "family", "category", "subcategory", "tone", "vendor", "gender", "split")
"""The columns that are not a language's tags."""

FRACTIONS = (("test", 0.2), ("validation", 0.1))

_COMPONENTS = "component"
_PEOPLE = "people-body"
_MALE = {"man", "men", "boy", "prince", "merman", "santa"}
_FEMALE = {"woman", "women", "girl", "princess", "mermaid", "mrs"}
_SAME_PERSON = {
    **dict.fromkeys(("1F468", "1F469"), "1F9D1"),  # man, woman: person
    **dict.fromkeys(("1F466", "1F467"), "1F9D2"),  # boy, girl: child
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),  # old man, old woman: older person
    **dict.fromkeys(("1F934", "1F478"), "1FAC5"),  # prince, princess: person with crown
    **dict.fromkeys(("1F930", "1FAC3"), "1FAC4"),  # pregnant woman, man: person
    **dict.fromkeys(("1F385", "1F936"), "1F9D1-1F384"),  # Santa Claus, Mrs Claus: Mx Claus
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1-1F91D-1F9D1"),  # two holding hands
    "1F57A": "1F483",  # man dancing: woman dancing
    "1F48F": "1F9D1-2764-1F48B-1F9D1",  # kiss
    "1F491": "1F9D1-2764-1F9D1",  # couple with heart
    "1F46A": "1F9D1-1F9D1-1F9D2",  # family
}
_JOINERS = {"200D", "FE0F"}
_VARIANTS = {"2640", "2642", "27A1"}
"""Female, male, facing right: what follows the first code point of a variant."""

Fetch = Callable[[Package, Path], Path]


def build_emoji(
    output: Path | None = None,
    languages: Sequence[str] | None = None,
    overwrite: bool = False,
    fetch: Fetch | None = None,
    packages: tuple[Package, Package, Package] = (NOTO, TWEMOJI, TAGS),
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Makes `emoji.parquet` and its card, each whole or not at all.

    Args:
        output: the folder; by default the one that `--data emoji` reads.
        languages: those of the texts, as emojibase names them; None for all.
        overwrite: replace what is there.
        fetch: brings a package's tarball into a folder; by default the npm client does.
        packages: the pictures of Noto and Twemoji, and the tags.
        report: told what is being done.

    Returns:
        The Parquet file.

    Raises:
        InputError: it exists already; npm is missing or fails; a checksum differs; an unknown language.
    """
    folder = output or NAMED["emoji"].folder
    path, card = folder / "emoji.parquet", folder / "README.md"
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already: pass --overwrite to build it again")
    if folder.is_dir():
        check_output_file(path, overwrite)
        check_output_file(card, overwrite=True)
        if card.exists() and not card.read_bytes().startswith(b"# emoji\n"):
            raise InputError(f"{card}: is not the card of this data set: name another --output")
    elif folder.exists():
        raise InputError(f"{folder}: is not a folder: name another --output")
    with tempfile.TemporaryDirectory(prefix="cmaclip-") as temporary:
        tarballs = []
        for package in packages:
            report(f"fetching {package.name} {package.version}")
            tarball = (fetch or npm_pack)(package, Path(temporary))
            _check(tarball, package)
            tarballs.append(tarball)
        report("reading pictures and tags")
        table = _table(tarballs, languages)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(card, _card(table, packages))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def npm_pack(package: Package, folder: Path) -> Path:
    """The tarball of a package, brought by the npm client into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise InputError("npm: not found: install Node.js, or name a folder with the packages' tarballs by --packages")
    command = [npm, "pack", f"{package.name}@{package.version}", "--silent", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.tarball).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise InputError(
            f"npm pack {package.name}@{package.version}: failed ({said[-1].strip()[:200]}): "
            "check the connection, or name a folder with the packages' tarballs by --packages"
        )
    return folder / package.tarball


def from_folder(folder: Path) -> Fetch:
    """Takes the tarballs from a folder where the user has put them."""

    def fetch(package: Package, _: Path) -> Path:
        tarball = folder / package.tarball
        if not tarball.is_file():
            raise InputError(f"{tarball}: no such file: fetch it with `npm pack {package.name}@{package.version}`")
        return tarball

    return fetch


def read_emoji(languages: str) -> Rows:
    """The rows of the built data set, once for each language: `de`, `de,fr`, `all`; English for an empty string.

    Pictures are shared between languages, not copied.

    Raises:
        InputError: the data set is not built, or not with this language.
    """
    named = NAMED["emoji"]
    if not named.path.is_file():
        raise InputError(f"{named.path}: the data set 'emoji' is not there yet: run `cmaclip data build emoji`")
    table = read_files([named.path]).table
    there = [name for name in table.column_names if name not in COLUMNS]
    wanted = there if languages == "all" else (languages or "en").split(",")
    for language in wanted:
        if language not in there:
            raise InputError(
                f"emoji:{languages}: no language '{language}'{near(language, there)}; languages: {', '.join(there)}; "
                "others come with `cmaclip data build emoji --languages all --overwrite`"
            )
    parts = [
        table.select([*COLUMNS, language])
        .rename_columns([*COLUMNS, "text"])
        .append_column("language", pa.array([language] * len(table)))
        for language in wanted
    ]
    return Rows(pa.concat_tables(parts), [named.path] * len(parts), [len(table)] * len(parts), named.columns)


def _check(tarball: Path, package: Package) -> None:
    digest = hashlib.sha512(tarball.read_bytes()).digest()
    found = "sha512-" + base64.b64encode(digest).decode()
    if found != package.integrity:
        raise InputError(
            f"{tarball.name}: checksum {found[:20]}... is not the expected {package.integrity[:20]}...: "
            "the file is damaged or another one; fetch it again"
        )


def _table(tarballs: Sequence[Path], languages: Sequence[str] | None) -> pa.Table:
    """A row for each picture, ordered as the emoji are, then by vendor."""
    sources = dict(zip(VENDORS, tarballs[:2], strict=True))
    pictures = {vendor: _pictures(tarball, VENDORS[vendor]) for vendor, tarball in sources.items()}
    emoji, tags, groups = _tags(tarballs[2], languages)
    families = defaultdict(list)
    for base in emoji:
        families[_family(base["hexcode"])].append(base)
    splits = _splits({family: _subcategory(members[0], groups) for family, members in families.items()})
    rows = []
    for base in emoji:
        code, family, subcategory = base["hexcode"], _family(base["hexcode"]), _subcategory(base, groups)
        category = subcategory.partition("/")[0]
        common = {
            "family": family,
            "category": category,
            "subcategory": subcategory,
            "gender": _gender(base, families[family]) if category == _PEOPLE else None,
            "split": splits[family],
            **{language: tags[language].get(code) for language in tags},
        }
        for variant in [base, *base.get("skins", [])]:
            for vendor, found in pictures.items():
                picture = found.get(_plain(variant["hexcode"]))
                if picture is not None:
                    row_id = f"{vendor}/{variant['hexcode']}"
                    rows.append(
                        {
                            "id": row_id,
                            "image": {"bytes": picture, "path": f"{row_id}.png"},
                            "emoji": variant["emoji"],
                            "vendor": vendor,
                            "tone": _tone(variant, base),
                            **common,
                        }
                    )
    return pa.Table.from_pylist(rows, schema=_schema(list(tags)))


def _schema(languages: list[str]) -> pa.Schema:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [(name, picture if name == "image" else pa.string()) for name in COLUMNS]
        + [(language, pa.string()) for language in languages]
    )


def _pictures(tarball: Path, vendor: str) -> dict[str, bytes]:
    """The PNG files that are the vendor's own, by code points without variation selectors."""
    files: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = member.name.removeprefix("package/")
            if name == "emoji.json":
                listed = json.loads(_content(archive, member))
            elif name.startswith(f"img/{vendor}/64/") and name.endswith(".png"):
                files[Path(name).name] = _content(archive, member)
    found = {}
    for entry in listed:
        for variant in [entry, *entry.get("skin_variations", {}).values()]:
            if variant[f"has_img_{vendor}"]:
                if variant["image"] not in files:
                    raise InputError(f"{tarball.name}: has no picture '{variant['image']}': fetch the package again")
                found[_plain(variant["unified"])] = files[variant["image"]]
    return found


def _tags(
    tarball: Path, languages: Sequence[str] | None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """The emoji of the English list, in order; for each language the tags by code points; the names of groups."""
    lists: dict[str, list[dict[str, Any]]] = {}
    groups: dict[str, dict[str, str]] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            parts = member.name.split("/")[1:]
            if parts[1:] == ["data.json"]:
                lists[parts[0]] = json.loads(_content(archive, member))
            elif parts == ["meta", "groups.json"]:
                groups = json.loads(_content(archive, member))
    chosen = sorted(lists) if languages is None else list(dict.fromkeys(languages))
    for language in chosen:
        if language not in lists:
            known = sorted(lists)
            raise InputError(f"--languages: no language '{language}'{near(language, known)}; known: {', '.join(known)}")
    emoji = [entry for entry in lists["en"] if "group" in entry]
    emoji = [entry for entry in emoji if groups["groups"][str(entry["group"])] != _COMPONENTS]
    tags = {
        language: {entry["hexcode"]: " ".join(entry["tags"]) for entry in lists[language] if entry.get("tags")}
        for language in chosen
    }
    return sorted(emoji, key=lambda entry: entry["order"]), tags, groups


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise InputError(f"{archive.name!s}: '{member.name}' is not a file: fetch the package again")
    return file.read()


def _plain(code: str) -> str:
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def _subcategory(entry: dict[str, Any], groups: dict[str, dict[str, str]]) -> str:
    return f"{groups['groups'][str(entry['group'])]}/{groups['subgroups'][str(entry['subgroup'])]}"


def _family(code: str) -> str:
    """The code points that an emoji shares with its variants of gender and direction, which stay in one split."""
    first, *rest = code.split("-")
    kept = [first, *(point for point in rest if point not in _JOINERS | _VARIANTS)]
    same = [_SAME_PERSON.get(point, point) for point in kept]
    adults, children = same.count("1F9D1"), same.count("1F9D2")
    if children and adults + children == len(same):
        return _SAME_PERSON["1F46A"]
    return "-".join(same)


def _tone(variant: dict[str, Any], base: dict[str, Any]) -> str | None:
    """The skin tone; `default` of an emoji that could have one; None where it cannot, or where two are shown."""
    if variant is base:
        return "default" if base.get("skins") else None
    tone = variant["tone"]
    return TONES[tone] if isinstance(tone, int) else None


def _gender(base: dict[str, Any], family: list[dict[str, Any]]) -> str | None:
    """`female` or `male` where all persons shown are, `neutral` for the third form beside these; else None."""
    named = _named_gender(base["label"])
    if named:
        return named if named in ("female", "male") else None
    return "neutral" if any(_named_gender(member["label"]) for member in family) else None


def _named_gender(label: str) -> str | None:
    words = set(re.findall(r"\w+", label.lower()))
    female, male = bool(words & _FEMALE), bool(words & _MALE)
    return "both" if female and male else "female" if female else "male" if male else None


def _splits(subcategories: dict[str, str]) -> dict[str, str]:
    """The split of each family: those of a subcategory, in the order of their hashes, are dealt in proportion."""
    groups = defaultdict(list)
    for family, subcategory in subcategories.items():
        groups[subcategory].append(family)
    splits = dict.fromkeys(subcategories, "train")
    owed = dict.fromkeys(dict(FRACTIONS), 0.0)
    for subcategory in sorted(groups):
        families = sorted(groups[subcategory], key=lambda family: hashlib.sha256(family.encode()).digest())
        left = len(families) - 1  # one at least is for training
        for split, fraction in FRACTIONS:
            owed[split] += fraction * len(families)
            taken = min(left, round(owed[split]))
            owed[split] -= taken
            for family in families[left - taken + 1 : left + 1]:
                splits[family] = split
            left -= taken
    return splits


def _card(table: pa.Table, packages: Sequence[Package]) -> str:
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "image"}
    languages = [name for name in table.column_names if name not in COLUMNS]
    rows = Counter(columns["split"])
    splits = "\n".join(f"| {split} | {rows[split]:,} |" for split in ("train", "validation", "test"))
    counts = {task: Counter(columns[task]) for task in NAMED["emoji"].columns.tasks}
    tasks = "\n".join(
        f"| `{task}` | {len([c for c in count if c])} | {table.num_rows - count[None]:,} | {_MEANING[task]} |"
        for task, count in counts.items()
    )
    sources = "\n".join(f"| {p.name} {p.version} | {use} |" for p, use in zip(packages, _USES, strict=True))
    return _CARD.format(
        rows=table.num_rows,
        families=len(set(columns["family"])),
        languages=", ".join(languages),
        number=len(languages),
        splits=splits,
        tasks=tasks,
        sources=sources,
    )


_MEANING = {
    "category": "group in Unicode's order",
    "subcategory": "`category/subgroup`",
    "tone": "five skin tones and `default` (yellow); null where an emoji has none, or shows two",
    "vendor": "`noto` or `twemoji`: the drawing style",
    "gender": "`female`, `male`, or `neutral` for the third form beside these; null elsewhere and where two are mixed",
}
_USES = (
    "pictures of Noto Emoji, by Google and contributors, Apache-2.0",
    "pictures of Twemoji, by Twitter, Inc and other contributors, CC-BY-4.0; drawn at 64 x 64 by the package",
    "tags, groups and skin tones, by Miles Johnson, MIT; the tags are those of Unicode's CLDR",
)
_CARD = """# emoji

{rows:,} pictures of emoji in two drawing styles, with tags as texts and five label columns. Made by
`cmaclip data build emoji`, read with `--data emoji` (English), `--data emoji:de` or `--data emoji:all`.

## Columns

| column | meaning |
|---|---|
| `id` | vendor and code points |
| `image` | PNG as in the package, 64 x 64, transparent, in a struct `{{bytes, path}}` |
| `emoji` | the characters |
| `family` | what an emoji shares with its variants; {families:,} in all |
| `split` | `train`, `validation` or `test` |
| {number} columns of texts | tags, separated by spaces: {languages} |

The label columns:

| task | classes | labelled rows | meaning |
|---|---|---|---|
{tasks}

Read by name, the table has one column `text` and a column `language`, and a row for each picture and language.

## What the text tells

The tags are those of the emoji without its skin tone, the same for both vendors: they say nothing of `tone` and
`vendor`. They tell most of `category` and, by words such as 'man', of `gender`. Components (bare skin tones, hair) are
left out, because their tags name a tone.

## Splits

| split | rows |
|---|---|
{splits}

The split is by family: all vendors, skin tones, genders and directions of one emoji are in one split, and about 70, 10
and 20 % of the families of each subcategory are in each. A subcategory with one family is for training.

## Source and licences

| npm package | what is taken |
|---|---|
{sources}

The packages emoji-datasource are by Cal Henderson, MIT. The checksums of all three are fixed in the program.

## Limits

- Drawings of 64 x 64 pixels, of one concept each: they compare systems, they do not rank models for photographs.
- Languages differ in how many tags they have, `en-gb` hardly differs from `en`, and a few texts are absent.
- `gender` follows the English names of the emoji; it says what a drawing is called, of people in general nothing.
"""
