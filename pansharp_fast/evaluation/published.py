"""Numbers as printed in the papers, for the PanCollection test sets alone; none was computed by this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WV3 = ("HQNR", "D_s", "D_lambda_K", "ERGAS", "SCC", "SAM", "Q2n", "PSNR", "SSIM")
_FOUR = ("HQNR", "D_s", "ERGAS", "SCC", "SAM", "PSNR")
_WV2 = ("HQNR", "ERGAS", "SCC", "SAM", "PSNR")
_UKNOW = ("PSNR", "SSIM", "SAM", "ERGAS", "SCC", "Q2n")

_CRAFTER = "PAN-Crafter (ICCV 2025), Table"
_DIFF = "U-Know-DiffPAN (CVPR 2025), results table"


@dataclass(frozen=True)
class Published:
    """Rows of one data set: method -> measure -> printed mean; where they stand, and what to know about them."""

    rows: Mapping[str, Mapping[str, float]]
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _rows(measures: Sequence[str], table: str) -> dict[str, dict[str, float]]:
    rows = {}
    for line in table.strip().splitlines():
        name, *values = line.split()
        rows[name] = dict(zip(measures, map(float, values), strict=True))
    return rows


#: PanCollection test set, by sensor.
PUBLISHED: dict[str, Published] = {
    "WV3": Published(
        _rows(
            _WV3,
            """
            PanNet      .918 .049 .035 2.538 .979 3.402 .913 36.148 .966
            MSDCNN      .924 .050 .028 2.489 .979 3.300 .914 36.329 .967
            FusionNet   .920 .053 .029 2.428 .981 3.188 .916 36.569 .968
            LAGConv     .915 .055 .033 2.380 .981 3.153 .916 36.732 .970
            S2DBPN      .946 .030 .025 2.245 .985 3.019 .917 37.216 .972
            PanDiff     .952 .034 .014 2.276 .984 3.058 .913 37.029 .971
            DCPNet      .923 .036 .043 2.301 .984 3.083 .915 37.009 .972
            TMDiff      .924 .059 .018 2.151 .986 2.885 .915 37.477 .973
            CANConv     .951 .030 .020 2.163 .985 2.927 .918 37.441 .973
            PAN-Crafter .958 .027 .016 2.040 .988 2.787 .922 37.956 .976
            """,
        )
        | _rows(
            _UKNOW,
            """
            U-Know-FSA-T 37.894 .976 2.801 2.055 .987 .921
            U-Know-FSA-S 37.930 .976 2.797 2.046 .988 .922
            """,
        ),
        (f"{_CRAFTER} 1", _DIFF),
    ),
    "GF2": Published(
        _rows(
            _FOUR,
            """
            PanNet      .929 .052 1.038 .975 1.050 39.197
            MSDCNN      .898 .079 .862 .983 .946 40.730
            FusionNet   .865 .105 .960 .980 .971 39.866
            LAGConv     .895 .078 .816 .985 .886 41.147
            S2DBPN      .935 .046 .686 .990 .772 42.686
            PanDiff     .936 .045 .674 .990 .767 42.827
            DCPNet      .953 .024 .724 .988 .806 42.312
            TMDiff      .942 .030 .754 .988 .764 41.896
            CANConv     .919 .063 .653 .991 .722 43.166
            PAN-Crafter .964 .017 .522 .994 .596 45.076
            """,
        )
        | _rows(
            (*_UKNOW, "D_lambda_K", "D_s", "HQNR"),
            """
            U-Know-FSA-T 44.757 .988 .603 .537 .994 .988 .017 .029 .953
            U-Know-FSA-S 44.585 .986 .624 .548 .993 .987 .018 .037 .944
            """,
        ),
        (f"{_CRAFTER} 2", _DIFF),
        (
            "PAN-Crafter's ERGAS contradicts itself in the paper: 0.522 in Table 2, 0.552 in Tables 7 and 12. "
            "Both are shown as printed; neither is confirmed.",
            "U-Know FSA-T's D_s is 0.029 in one table of its paper and 0.030 in another.",
        ),
    ),
    "QB": Published(
        _rows(
            _FOUR,
            """
            PanNet      .851 .092 4.856 .966 5.273 35.563
            MSDCNN      .888 .058 4.074 .977 4.828 37.040
            FusionNet   .853 .079 4.183 .975 4.892 36.821
            LAGConv     .892 .035 3.845 .980 4.682 37.565
            S2DBPN      .908 .036 3.956 .980 4.849 37.314
            PanDiff     .919 .055 3.723 .982 4.611 37.842
            DCPNet      .880 .073 3.618 .983 4.420 38.079
            TMDiff      .901 .068 3.804 .981 4.627 37.642
            CANConv     .893 .070 3.740 .982 4.554 37.795
            PAN-Crafter .920 .039 3.570 .984 4.426 38.195
            """,
        )
        | _rows(
            _UKNOW,
            """
            U-Know-FSA-T 38.343 .964 4.349 3.502 .985 .938
            U-Know-FSA-S 38.361 .964 4.337 3.500 .984 .938
            """,
        ),
        (f"{_CRAFTER} 2", _DIFF),
    ),
    "WV2": Published(
        _rows(
            _WV2,
            """
            PanNet      .875 5.481 .876 7.040 27.120
            LAGConv     .902 5.133 .885 6.094 27.525
            S2DBPN      .813 5.703 .915 7.063 26.748
            PanDiff     .932 4.291 .916 5.430 28.964
            DCPNet      .797 5.507 .931 10.174 27.063
            TMDiff      .874 5.157 .875 6.087 27.473
            CANConv     .876 4.328 .918 5.481 29.005
            PAN-Crafter .942 4.169 .924 5.078 29.276
            """,
        ),
        (f"{_CRAFTER} 3",),
        ("Networks trained on WV3 and never shown WV2.",),
    ),
}

#: Printed values that the same paper contradicts: (data set, method, measure) -> the other printed value.
CONTRADICTED = {("GF2", "PAN-Crafter", "ERGAS"): 0.552}


def recognise(sensor: str, protocol: str, scenes: int, side: int) -> str | None:
    """Name of the PanCollection test set that a data set has the sensor, number and size of, or None.

    Args:
        sensor: canonical name.
        protocol: "reduced" or "full".
        scenes: number of scenes.
        side: height and width of PAN, 0 where they differ between scenes.
    """
    expected = {"reduced": 256, "full": 512}[protocol]
    return sensor if sensor in PUBLISHED and scenes == 20 and side == expected else None
