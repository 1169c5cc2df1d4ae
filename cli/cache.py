"""coeft cache: where decoded images and sounds and tokenised texts lie, and how to be rid of them."""

import time

from .arguments import Parser

NOUN = {"images": "images", "tokens": "texts", "waveforms": "sounds", "spectrograms": "sounds"}


def main(argv: list[str]) -> int:
    parser = Parser(
        "cache",
        "Show the cache of decoded images and sounds and tokenised texts, the latest used first, or clear it. "
        "COEFT_CACHE=DIR moves it; COEFT_CACHE_SIZE=20GB bounds it (100GB without it): what was not used longest goes "
        "first.",
    )
    parser.add_argument("what", nargs="?", choices=["clear"], help="delete all entries")
    arguments = parser.parse_args(argv)
    from coeft.config import shorten_home
    from coeft.data._entries import cache_info, clear_cache

    if arguments.what == "clear":
        files, size = clear_cache()
        print(f"deleted {files} files, {size / 2**20:.1f} MiB")
        return 0
    info = cache_info()
    whole = f"{info['bytes'] / 2**20:.1f} MiB of at most {info['limit'] / 2**20:,.0f} MiB"
    print(f"{shorten_home(str(info['folder']))}: {info['files']} files, {whole}")
    for entry in info["entries"]:
        count = f"{entry['samples'] or 0:>8} {NOUN[entry['kind']]:6}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"]))
        print(f"  {entry['bytes'] / 2**20:8.1f} MiB  {count}  used {used}  {entry['made_from']}")
    return 0
