// CPU kernels of the crossbar family, one set an instruction set (see core/isa.h).
#pragma once
#include "../core/isa.h"
#include "crossbar.h"

namespace pyaccel::crossbar {

PYACCEL_DECLARE_KERNELS(                             //
    Fault matrix(const Matrix&);                     //
    Fault matrix_gradient(const MatrixGradient&);    //
    void matmul(const Matmul&);                      //
    void quantize(const Quantize&);                  //
    void normal(const Normal&);)

}  // namespace pyaccel::crossbar
