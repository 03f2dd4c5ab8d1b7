// CPU kernels of the neuron family, one set an instruction set (see core/isa.h).
#pragma once
#include "../core/isa.h"
#include "neuron.h"

namespace pyaccel::neuron {

PYACCEL_DECLARE_KERNELS(                              //
    void lif_forward(const LifForward&);              //
    void lif_backward(const LifBackward&);            //
    void bntt_statistics(const BnttStatistics&);      //
    void bntt_forward(const BnttForward&);            //
    void bntt_backward(const BnttBackward&);          //
    void encode(const Encode&);)

}  // namespace pyaccel::neuron
