// How the elements of a tensor are stored.
#pragma once

namespace psf {
enum class Element { f32, f64, bf16, f16 };
}
