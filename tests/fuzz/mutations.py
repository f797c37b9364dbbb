"""Damage to files, drawn from seeds: of headers, data, structure, compressed streams and text.

Each function takes a random generator and bytes, and returns other bytes.
"""

import bz2
import contextlib
import gzip
import zlib

import numpy as np

CARD, BLOCK = 80, 2880

VALUES = [
    *("-1", "0", "1", "2", "-32", "1.5", "1e300", "-1e300", "NaN", "Inf", "T", "F", "'x'", "''"),
    *("99999999999999999999", "999999999", "1E5", "100000", "2147483648", "'J2000'", "1,5", "/"),
    *("30 s", "'1.5D2'", "1950.0", "'TAN-SIP'", "'RA---ZEA-SIP'", "9", "'GZIP_1'", "'1PB(9)'"),
]
"""What is put into cards."""

STRUCTURAL = (
    *("BITPIX", "NAXIS", "NAXIS1", "NAXIS2", "PCOUNT", "GCOUNT", "BZERO", "BSCALE", "TFIELDS"),
    *("ZBITPIX", "ZNAXIS", "ZNAXIS1", "ZNAXIS2", "ZTILE1", "ZTILE2", "ZCMPTYPE", "ZVAL1", "TFORM1"),
    *("CTYPE1", "CRVAL1", "CD1_1", "CRPIX2", "EQUINOX", "EXPTIME", "FILTER", "MJD-OBS", "EXTNAME"),
    *("DATASUM", "CHECKSUM", "XTENSION", "ZIMAGE", "TTYPE1", "BLANK", "ZQUANTIZ", "ZBLANK", "RA"),
)
"""Cards that are hit more often than others."""


def headers(content):
    """Return where the headers of a FITS file are, as pairs of offsets."""
    found, start = [], 0
    while start < len(content):
        if content[start : start + 8] in (b"SIMPLE  ", b"XTENSION"):
            end = start
            while end < len(content) and content[end : end + 8] != b"END     ":
                end += CARD
            found.append((start, end + CARD))
            start = end - end % BLOCK
        start += BLOCK
    return found


def change_card(rng, content):
    """Change the value of a card, its name, or what it consists of."""
    start, end = pick(rng, headers(content))
    cards = list(range(start, end, CARD))
    place = pick(rng, cards)
    wanted = [at for at in cards if content[at : at + 8].decode("latin-1").strip() in STRUCTURAL]
    if wanted and rng.random() < 0.7:
        place = pick(rng, wanted)
    card = content[place : place + CARD]
    how = rng.integers(6)
    if how < 3:
        new = card[:8] + f"= {pick(rng, VALUES):>20}".encode().ljust(CARD - 8)
    elif how == 3:
        new = bytes(rng.integers(0, 256, CARD, dtype="u1"))
    elif how == 4:
        new = f"{pick(rng, STRUCTURAL):<8}= {pick(rng, VALUES):>20}".encode().ljust(CARD)
    else:
        new = content[pick(rng, cards) :][:CARD]
    return content[:place] + new[:CARD] + content[place + CARD :]


def add_cards(rng, content):
    """Put blocks of cards into a header."""
    _, end = pick(rng, headers(content))
    number = 36 * int(rng.integers(1, 40))
    kind = pick(rng, [b"COMMENT ", b"HISTORY ", b"CONTINUE", b"HIERARCH", b"AAAA    "])
    cards = b"".join((kind + b"= 'x" + str(n).encode()).ljust(CARD) for n in range(number))
    return content[: end - CARD] + cards + content[end - CARD :]


def remove_end(rng, content):
    """Take away the END of a header."""
    _, end = pick(rng, headers(content))
    return content[: end - CARD] + b" " * CARD + content[end:]


def flip_bits(rng, content):
    """Change single bits anywhere."""
    changed = bytearray(content)
    for place in rng.integers(0, len(content), int(rng.integers(1, 6))):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwrite(rng, content):
    """Overwrite a stretch with zeros, ones or noise."""
    length = min(int(rng.integers(1, 6000)), len(content))
    place = int(rng.integers(0, len(content) - length + 1))
    noise = rng.integers(0, 256, length, dtype="u1")
    stretch = pick(rng, [bytes(length), b"\xff" * length, bytes(noise), b" " * length])
    return content[:place] + stretch + content[place + length :]


def cut(rng, content):
    """Cut a file off."""
    return content[: int(rng.integers(0, len(content)))]


def move_blocks(rng, content):
    """Remove, repeat or exchange blocks, or put noise between them."""
    n = max(len(content) // BLOCK, 1)
    a, b = sorted(BLOCK * int(i) for i in rng.integers(0, n + 1, 2))
    noise = bytes(rng.integers(0, 256, int(rng.integers(1, 5000)), dtype="u1"))
    return pick(
        rng,
        [
            content[:a] + content[b:],
            content[:b] + content[a:],
            content[:a] + noise + content[a:],
            content + noise,
            content + bytes(BLOCK),
            content[b:] + content[:b],
        ],
    )


def hidden_from_sums(content, whole):
    """Tell whether checksums cannot show the damage: one is gone, or their sum is as it was."""
    with contextlib.suppress(OSError, EOFError, zlib.error):
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    fewer = content.count(b"CHECKSUM= '") < whole.count(b"CHECKSUM= '")
    return fewer or ones_complement(content) == ones_complement(whole)


def ones_complement(content):
    """Return the sum of the words of a file as FITS takes it, by the plain formula."""
    padded = content + bytes(-len(content) % 4)
    return int(np.frombuffer(padded, ">u4").sum(dtype=np.uint64)) % 0xFFFFFFFF


def change_text(rng, content):
    """Change words, lines, quotes and letters of a table."""
    lines = content.split(b"\n")
    number = int(rng.integers(0, len(lines)))
    line = lines[number]
    how = rng.integers(8)
    if how == 0:
        lines.pop(number)
    elif how == 1:
        lines.insert(number, line)
    elif how == 2:
        lines[number] = line + pick(rng, [b'"', b" x", b",", b"\0", "\u2028".encode(), b"\xff\xfe"])
    elif how == 3:
        lines[number] = b"[" * 100_000
    elif how == 4:
        lines[number] = b'"' + b"a" * 200_000
    elif how == 5:
        cells = line.split(pick(rng, [b" ", b","]))
        nasty = [b"", b"nan", b"1e400", b"-1", b"9" * 5000, b"[[1]]", b'"', b"{}", b"\xe2\x82"]
        cells[int(rng.integers(0, len(cells)))] = pick(rng, nasty)
        lines[number] = pick(rng, [b" ", b","]).join(cells)
    elif how == 6:
        lines[number] = line[: int(rng.integers(0, len(line) + 1))]
    else:
        return flip_bits(rng, content)
    return b"\n".join(lines)


def bomb(rng, content):
    """Return a gzip or bzip2 file of little content that becomes 200 MB of a claimed image."""
    start, end = headers(content)[-1]
    header = bytearray(content[start:end])
    for name, value in (("NAXIS1", 20000), ("NAXIS2", 5000)):
        at = bytes(header).find(name.encode().ljust(8))
        if at >= 0:
            header[at : at + CARD] = f"{name:<8}= {value:>20}".encode().ljust(CARD)
    head = content[:start] + bytes(header)
    head += b" " * (-len(head) % BLOCK)
    zeros = bytes(1 << 20)
    if rng.random() < 0.5:
        return gzip.compress(head) + gzip.compress(zeros, 1) * 200
    return bz2.compress(head) + bz2.compress(zeros) * 200


def gzipped(rng, content):
    """Damage a compressed file, or compress a damaged one."""
    how = rng.integers(4)
    if how == 0:
        return flip_bits(rng, gzip.compress(content, 1))
    if how == 1:
        return cut(rng, gzip.compress(content, 1))
    if how == 2:
        return bomb(rng, content)
    return gzip.compress(pick(rng, [change_card, flip_bits, cut])(rng, content), 1)


def packed(rng, content):
    """Damage only the data of the last HDU: tiles, their descriptors, rows of a table."""
    _, end = headers(content)[-1]
    start = min(end + -end % BLOCK, len(content) - 1)
    part = content[start:]
    return content[:start] + pick(rng, [flip_bits, overwrite])(rng, part)


OF_FITS = [change_card] * 5 + [flip_bits, overwrite, cut, move_blocks, add_cards, remove_end]
OF_FITS += [packed, gzipped]
OF_TABLES = [change_text] * 5 + [flip_bits, overwrite, cut]
OF_DATABASES = [flip_bits] * 3 + [overwrite] * 3 + [cut, move_blocks]


def pick(rng, items):
    """Return one of several items."""
    return items[int(rng.integers(0, len(items)))]


def mutated(seed, number, name, content, kinds):
    """Return a damaged file, the same for the same seed, number and name, and what was done."""
    rng = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
    kind = pick(rng, kinds)
    return kind(rng, content), kind.__name__
