"""What smlmlp's other blocks and their pipeline are asked for the golden values."""

# The shape and dtype of each channel's frames; made by `cases.Case`.
CHANNELS = (((13, 9, 8), "uint16"), ((6, 7, 11), "float32"))

# By name, a function of smlmlp and its options.
BLOCKS = {
    "median": ("bkgd_temporal_median", {}),
    "median of one": ("bkgd_temporal_median", {"median_window_fr": 0}),
    "median of nine": ("bkgd_temporal_median", {"median_window_fr": 4}),
    "opening": ("bkgd_spatial_opening", {}),
    "opening by a dot": ("bkgd_spatial_opening", {"channels_opening_radii_pix": 0.5}),
    "opening by two ellipses": (
        "bkgd_spatial_opening",
        {"channels_opening_radii_pix": [(1.5, 4.0), (20.0, 2.6)]},
    ),
    "pipeline": ("bkgd_combination", {}),
    "pipeline of three": (
        "bkgd_combination",
        {
            "do_spatial_opening": True,
            "channels_opening_radii_pix": [(2.0, 2.0), (1.0, 5.0)],
            "median_window_fr": 2,
            "channels_mean_radii_pix": [(3.0, 3.0), (2.0, 4.0)],
        },
    ),
}
