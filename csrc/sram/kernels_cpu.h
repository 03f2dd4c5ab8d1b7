// CPU kernels of the sram family, one set an instruction set (see core/isa.h).
#pragma once
#include "../core/isa.h"
#include "sram.h"

namespace pyaccel::sram {

PYACCEL_DECLARE_KERNELS(                             //
    void flip(const Flip&);                          //
    void noise(const Noise&);                        //
    void noise_backward(const NoiseBackward&);       //
    void raw_philox(const RawPhilox&);)

}  // namespace pyaccel::sram
