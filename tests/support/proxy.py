"""A TCP proxy that misbehaves as a file tells it: ``pass``, ``delay``, ``stall`` or ``reset``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path


async def main(port: int, host: str, target: int, mode: Path) -> None:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                match mode.read_text():
                    case "delay":
                        await asyncio.sleep(0.3)
                    case "reset":
                        writer.transport.abort()
                        return
                while mode.read_text() == "stall":
                    await asyncio.sleep(0.2)
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if mode.read_text() == "reset":
            writer.transport.abort()
            return
        try:
            back, forth = await asyncio.open_connection(host, target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, forth), pump(back, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])))
