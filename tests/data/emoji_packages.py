"""Small npm packages of the same form as those that the data set `emoji` is built from."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from cmaclip_fast.data.emoji import NOTO, TAGS, TWEMOJI, Package

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
GROUPS = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "2": "component", "3": "animals-nature"},
    "subgroups": {"0": "face-smiling", "1": "hands", "2": "person-activity", "3": "skin-tone", "4": "animal-mammal"},
}
# hexcode, English name, group, subgroup, has skin tones, tags by language
EMOJI: list[tuple[str, str, int, int, bool, dict[str, list[str]]]] = [
    ("1F600", "grinning face", 0, 0, False, {"en": ["face", "grin"], "ja": ["笑顔"]}),
    ("1F44D", "thumbs up", 1, 1, True, {"en": ["hand", "like"], "ja": ["いいね", "手"]}),
    ("1F3C3", "person running", 1, 2, True, {"en": ["fast", "race"], "ja": ["走る人"]}),
    ("1F3C3-200D-2642-FE0F", "man running", 1, 2, True, {"en": ["fast", "man"], "ja": ["走る男"]}),
    ("1F3C3-200D-2640-FE0F", "woman running", 1, 2, True, {"en": ["fast", "woman"], "ja": []}),
    ("1F3FB", "light skin tone", 2, 3, False, {"en": ["skin", "tone"], "ja": ["肌"]}),
    *((f"1F40{i}", f"animal {i}", 3, 4, False, {"en": ["animal", f"kind{i}"], "ja": ["動物"]}) for i in range(10)),
]


def write_packages(folder: Path, missing: str | None = None) -> tuple[Package, Package, Package]:
    """Writes the three tarballs; `missing` names a picture that Noto does not have and says so."""
    packages = []
    for package, vendor in ((NOTO, "google"), (TWEMOJI, "twitter")):
        entries, files = [], {}
        for code, name, *_, tones, _ in EMOJI:
            entry = _picture(code, vendor, missing)
            if tones:
                first, _, rest = code.partition("-")
                skins = {tone: "-".join(filter(None, (first, tone, rest))) for tone in TONES}
                entry["skin_variations"] = {tone: _picture(skin, vendor, missing) for tone, skin in skins.items()}
            entries.append({"name": name.upper(), "category": "not used", **entry})
            for shown in [entry, *entry.get("skin_variations", {}).values()]:
                files[f"img/{vendor}/64/{shown['image']}"] = _png(len(files), vendor)
        packages.append(_write(folder, package, {"emoji.json": json.dumps(entries).encode(), **files}))
    lists = {
        f"{language}/data.json": json.dumps(
            [_tags(order, language, *one) for order, one in enumerate(EMOJI)]
            + [{"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "A"}]
        ).encode()
        for language in ("en", "ja")
    }
    packages.append(_write(folder, TAGS, {**lists, "meta/groups.json": json.dumps(GROUPS).encode()}))
    noto, twemoji, tags = packages
    return noto, twemoji, tags


def _picture(code: str, vendor: str, missing: str | None) -> dict[str, Any]:
    has = vendor != "google" or code != missing
    return {"unified": code, "image": f"{code.lower()}.png", f"has_img_{vendor}": has}


def _tags(
    order: int, language: str, code: str, name: str, group: int, subgroup: int, tones: bool, tags: dict[str, list[str]]
) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": name if language == "en" else "名前", "hexcode": code, "order": order}
    entry |= {"emoji": "".join(chr(int(point, 16)) for point in code.split("-")), "group": group, "subgroup": subgroup}
    entry["tags"] = tags[language]
    if tones:
        first, _, rest = code.partition("-")
        codes = ["-".join(filter(None, (first, tone, rest))) for tone in TONES]
        # emojibase leaves variation selectors out where the picture packages write them
        skins = [
            {"hexcode": c.replace("-FE0F", ""), "emoji": c, "tone": t, "label": "x"} for t, c in enumerate(codes, 1)
        ]
        if name == "thumbs up":
            skins[4]["tone"] = [1, 5]
        entry["skins"] = skins
    return entry


def _png(number: int, vendor: str) -> bytes:
    stream = io.BytesIO()
    colour = (number * 7 % 256, 90 if vendor == "google" else 200, 40, 255)
    Image.new("RGBA", (64, 64), colour).save(stream, "PNG")
    return stream.getvalue()


def _write(folder: Path, package: Package, files: dict[str, bytes]) -> Package:
    path = folder / package.tarball
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return replace(package, integrity=f"sha512-{digest}")
