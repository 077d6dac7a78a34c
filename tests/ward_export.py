"""A small raw export of two hospitals on disk, with the card that describes it: what tests of the command line break on purpose.

Everything that could name a person begins with one of CANARIES.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Names, record numbers, study ids, dates and image file names, as they stand in the export.
CANARIES = ("Zqfamilyname", "MRN7719", "STAY8826", "2031-", "XRAYFILE")

CARD = """
kind: hospital_export
name: ward
licence: {name: none}
sites: {folders: [north, south]}
tables:
  stays: {path: "{site}/stays.csv", study: stay, subject: patient, static: true}
  labs: {path: "{site}/labs.csv", study: stay, time: at, code: item, value: value, unit: unit}
  images: {path: "{site}/images.csv", study: stay, time: at}
studies: {table: stays, anchor: {column: admitted, offset_h: 24}}
label: death
labels: {death: {column: outcome, classes: [survived, died], values: {alive: survived, dead: died}}}
modalities:
  - {kind: image, name: cxr, table: images, file: file, path: "{site}/img/{file}", window_h: [-24, 0], height: 16, width: 16}
  - kind: table
    name: labs
    table: labs
    window_h: [-24, 0]
    variables:
      - {name: glucose, code: GLU, canonical: mmol/L, range: [1, 60], molar_mass_g_mol: 180.156}
  - {kind: table, name: history, table: stays, variables: [{name: age, unit: year, range: [0, 120]}]}
"""


def write_ward(folder: Path, num_studies: int = 24) -> Path:
    """Writes card.yaml and raw/ below the folder, `num_studies` a site; row i + 2 of every table belongs to study i."""
    generator = np.random.default_rng(0)
    for number, site in enumerate(("north", "south")):
        images = folder / "raw" / site / "img"
        images.mkdir(parents=True)
        rows: dict[str, list[str]] = {
            "stays": ["stay,patient,surname,admitted,age,outcome"],
            "labs": ["stay,at,item,value,unit"],
            "images": ["stay,at,file"],
        }
        for i in range(num_studies):
            stay, day, name = f"STAY8826{number}{i:03d}", f"2031-03-{1 + i % 28:02d}", f"XRAYFILE{number}{i:03d}.png"
            outcome = "dead" if i % 3 == 0 else "alive"
            rows["stays"].append(f"{stay},MRN7719{number}{i:03d},Zqfamilyname{i},{day} 06:00,{50 + i % 40},{outcome}")
            rows["labs"].append(f"{stay},{day} 12:00,GLU,{90 + i},mg/dL")
            rows["images"].append(f"{stay},{day} 10:00,{name}")
            notes = PngInfo()
            notes.add_text("PatientName", f"Zqfamilyname{i}")
            pixels = generator.integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(images / name, pnginfo=notes)
        for table, lines in rows.items():
            (folder / "raw" / site / f"{table}.csv").write_text("\n".join(lines) + "\n")
    (folder / "card.yaml").write_text(CARD)
    return folder


def replace_text(path: Path, old: str, new: str) -> None:
    """Changes the first `old` in a file, which must be there."""
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def image_file(folder: Path, study: int = 3) -> Path:
    """The radiograph of a study of the first site."""
    return folder / "raw" / "north" / "img" / f"XRAYFILE0{study:03d}.png"
