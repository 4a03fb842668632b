"""Quick start: the background of a movie in three lines, and a picture of it.

    python examples/quick_start.py

It writes quick_start.png to the folder it runs in. With a movie of your own, `frames` is
an array (frames, height, width) in ADU, less the camera's offset.
"""

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxbkgd


camera = jaxbkgd.Camera(offset_adu=100.0, gain_electrons_per_adu=0.46)
movie, truth = jaxbkgd.simulate_movie(jax.random.key(0))
frames = camera.above_offset(movie)

background = jaxbkgd.SpatialMean(radii_pix=7.0)(frames)
noise_correction = background.noise_corrections
snr = background.snr(frames, camera)

mean, true_mean = background.bkgds.mean(), truth.bkgds_adu.mean()
print(f"background        {mean:.1f} ADU (true {true_mean:.1f})")
print(f"noise correction  {noise_correction:.3f}")

figure = Figure((9, 3), dpi=80, layout="constrained")
panels = {
    "frame (ADU)": frames[0],
    "background (ADU)": background.bkgds[0],
    "SNR": snr[0],
}
for axes, (title, image) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    low, high = np.percentile(image, [0.5, 99.8])
    shown = axes.imshow(image, cmap="magma", vmin=low, vmax=high)
    figure.colorbar(shown, ax=axes)
    axes.set(title=title, xticks=[], yticks=[])
figure.savefig("quick_start.png")
print("wrote quick_start.png")
