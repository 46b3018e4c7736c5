"""Where functions lie in executables and shared libraries, which is where uprobes are put."""

from __future__ import annotations

from pathlib import Path

from kbpf.errors import ObjectError


def function_offset(path: str, name: str) -> int:
    """Bytes from the file's start to the function. Raises `ObjectError` where there is none, `OSError` for the file."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    with Path(path).open("rb") as file:
        try:
            elf = ELFFile(file)
            for section in elf.iter_sections():
                if not isinstance(section, SymbolTableSection):
                    continue
                for symbol in section.get_symbol_by_name(name) or ():
                    if symbol["st_info"]["type"] != "STT_FUNC" or symbol["st_shndx"] == "SHN_UNDEF":
                        continue
                    for segment in elf.iter_segments("PT_LOAD"):
                        within = int(symbol["st_value"]) - int(segment["p_vaddr"])
                        if 0 <= within < segment["p_filesz"]:
                            return within + int(segment["p_offset"])
        except ELFError as error:
            raise ObjectError(f"{path}: {error}") from None
    raise ObjectError(f"{path} has no function {name}")
