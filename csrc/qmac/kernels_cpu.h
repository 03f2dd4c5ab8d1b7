// CPU kernels of the qmac family, one set an instruction set (see core/isa.h).
#pragma once
#include "../core/isa.h"
#include "qmac.h"

namespace pyaccel::qmac {

PYACCEL_DECLARE_KERNELS(                    //
    void pack(Pack&);                       //
    void unpack(const Pack&);               //
    void linear(const Linear&);             //
    void convolution(Conv&);                //
    void quantize(const Quantize&);         //
    void dequantize(const Dequantize&);     //
    void to_signed(const Signed&);)

}  // namespace pyaccel::qmac
