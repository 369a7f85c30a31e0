"""What is in tars and zips, member by member, however damaged they are."""
import functools
import io
import tarfile
import zipfile

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".zip")
MOST_HEADER = 2 ** 20  # bytes of names and comments of a file in a tar
MOST_ZEROS = 2 ** 21  # at the end of a tar
# members of a tar that describe the next one, and which tarfile reads whole
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)


class Header(tarfile.TarInfo):
    """Raises ReadError where tarfile would fill the memory, or take what is damaged for the archive's end."""
    def _proc_member(self, tar):  # tarfile offers it to subclasses
        if self.type in EXTENSIONS and self.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)

    @classmethod
    def fromtarfile(cls, tar):
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # a block of zeros: the end, or that of the first of several tars
            tar.zeros = getattr(tar, "zeros", 0) + tarfile.BLOCKSIZE
            raise
        except tarfile.EmptyHeaderError:
            if not 0 < getattr(tar, "zeros", 0) <= MOST_ZEROS:
                raise tarfile.ReadError("no zeros at its end, or too many: an incomplete download?") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        tar.zeros = 0
        return header


def members(path):
    """Yield (name, size, read, later) of each file; read() gives its bytes, at once or `later` too; None for a link."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename.rpartition(".")):
                yield member.filename, member.file_size, functools.partial(archive.read, member), False
    else:
        with tarfile.open(path, tarinfo=Header, ignore_zeros=True) as tar:
            for member in tar:
                tar.members = []  # or tarfile keeps every header
                later = member.isreg() and not member.issparse() and isinstance(tar.fileobj, io.BufferedReader)
                read = functools.partial(read_at, path, member.offset_data, member.size) if later else (
                    (lambda: tar.extractfile(member).read()) if member.isfile() else None)
                if not member.isdir():
                    yield member.name, member.size, read, later


def read_at(path, offset, size):
    with open(path, "rb") as file:
        file.seek(offset)
        if len(data := file.read(size)) == size:
            return data
    raise EOFError("the archive breaks off within it")
